"""What data hands to the model: rows of tokens, each token with its label and its weight in the loss.

A row is one sequence, or several packed one behind another; then `cu_seqlens` says where each begins, and attention
and positions stay within them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that nothing predicts, as in transformers."""


@dataclass(frozen=True)
class TextBatch:
    """One microbatch of text."""

    tokens: Tensor
    """[rows, length], int64."""
    labels: Tensor
    """[rows, length], int64: the token that each position is to predict; where the weight is 0, anything valid."""
    loss_weights: Tensor
    """[rows, length], float32: what each position's loss counts."""
    cu_seqlens: Tensor | None = None
    """[documents + 1], int32: where the documents of the one row begin, and its length; None: each row is one."""

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.labels.shape == self.loss_weights.shape, "one label and weight a token"
        if self.cu_seqlens is not None:
            assert self.tokens.size(0) == 1, "a microbatch of packed documents is one row"
            assert int(self.cu_seqlens[-1]) == self.tokens.size(1), "the documents must fill the row"

    @property
    def target_tokens(self) -> Tensor:
        """How many positions count in the loss: an int32 scalar, the form megatron-core asks for."""
        return self.loss_weights.count_nonzero().to(torch.int32)

    def to(self, device: torch.device) -> TextBatch:
        """The batch on another device."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return TextBatch(self.tokens.to(device), self.labels.to(device), self.loss_weights.to(device), cu_seqlens)


def next_token_batch(tokens: Tensor, targets: Tensor | None = None, cu_seqlens: Tensor | None = None) -> TextBatch:
    """Each position predicts the one behind it; `targets` are labels in transformers' sense (IGNORED: not trained).

    The last position of a row, and of each packed document, predicts nothing.
    """
    targets = tokens if targets is None else targets
    shifted = torch.roll(targets, -1, dims=1)
    ends = torch.tensor([tokens.size(1)]) if cu_seqlens is None else cu_seqlens[1:].long()
    shifted[:, ends - 1] = IGNORED
    counts = shifted != IGNORED
    return TextBatch(tokens, shifted.masked_fill(~counts, 0), counts.float(), cu_seqlens)
