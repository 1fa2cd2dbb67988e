"""Trainable rows for the two new tokens inside a frozen vocabulary, at its input and at its output.

A vocabulary is frozen as a whole or not at all, so the rows of the two tokens are parameters of their own that take
the place of the frozen ones; `merge_into` writes them back. The vocabulary stays split over the tensor-parallel ranks;
the two rows are small and every rank holds them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.model.towers import mark_vision_parallel


class NewTokenRows(nn.Module):
    """The rows of some tokens of a vocabulary matrix, of which this rank holds the rows from `first_row` on."""

    def __init__(self, token_ids: tuple[int, ...], config: TransformerConfig, first_row: int) -> None:
        super().__init__()
        self.token_ids, self.first_row, self.sequence_parallel = token_ids, first_row, config.sequence_parallel
        shape = (len(token_ids), config.hidden_size)
        self.rows = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.rows.beside_vocabulary = True  # type: ignore[attr-defined]

    def take_from(self, vocabulary: Tensor, group: dist.ProcessGroup) -> None:
        """Start from the frozen rows, wherever they are held."""
        with torch.no_grad():
            self.rows.zero_()
            for row, local in self._held(vocabulary):
                self.rows[row] = vocabulary[local]
            dist.all_reduce(self.rows.data, group=group)

    def merge_into(self, vocabulary: Tensor) -> None:
        """Write the rows back into this rank's part of the vocabulary."""
        with torch.no_grad():
            for row, local in self._held(vocabulary):
                vocabulary[local] = self.rows[row]

    def _held(self, vocabulary: Tensor) -> list[tuple[int, int]]:
        """(our row, its row in this rank's part) of the tokens that the part holds."""
        local = [(row, token - self.first_row) for row, token in enumerate(self.token_ids)]
        return [(row, place) for row, place in local if 0 <= place < vocabulary.size(0)]


class NewInputRows(NewTokenRows):
    """At the embedding."""

    def __init__(self, token_ids: tuple[int, ...], config: TransformerConfig, first_row: int) -> None:
        super().__init__(token_ids, config, first_row)
        # Under sequence parallelism each rank sees its own slice of the tokens: its gradient is a part of the sum.
        self.rows.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, embedded: Tensor, input_ids: Tensor) -> Tensor:
        """embedded [s, b, h], this rank's slice under sequence parallelism; input_ids [b, s], the whole row."""
        for row, token in enumerate(self.token_ids):
            is_token = (input_ids == token).transpose(0, 1).unsqueeze(-1)
            if self.sequence_parallel:
                is_token = scatter_to_sequence_parallel_region(is_token.to(embedded.dtype)) > 0
            embedded = torch.where(is_token, self.rows[row], embedded)
        return embedded


class NewOutputRows(NewTokenRows):
    """At the output layer, as a hook behind it."""

    def __init__(self, token_ids: tuple[int, ...], config: TransformerConfig, first_row: int) -> None:
        super().__init__(token_ids, config, first_row)
        # Only the rank that holds a token's column computes with its row: the gradients are summed over the ranks.
        mark_vision_parallel(self)

    def watch(self, output_layer: nn.Module) -> None:
        """Have the columns of the tokens computed from our rows.

        By a call of this module: an overlapped gather of its parameters is waited for by its own hooks.
        """
        output_layer.register_forward_hook(self)

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> Any:
        hidden, logits = inputs[0], output[0]
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        columns = F.linear(hidden, self.rows)
        weight = cast(Tensor, layer.weight)
        # Generation has the logits gathered: then every rank holds every column, in the place of its token.
        is_gathered = logits.size(-1) > weight.size(0)
        held = list(enumerate(self.token_ids)) if is_gathered else self._held(weight)
        if not held:
            # Every rank takes part in the collectives of the backward pass, also one that holds none of the columns.
            return logits + 0.0 * columns.sum(), output[1]
        for row, local in held:
            logits[..., local] = columns[..., row]
        return logits, output[1]
