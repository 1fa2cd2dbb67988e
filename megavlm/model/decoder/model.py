"""The decoder: megatron-core's GPT model with a loss that knows which vocabulary rows are padding."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.spec import decoder_block


class Decoder(GPTModel):
    """A GPT model whose vocabulary is padded to divide over the tensor-parallel ranks.

    Padded rows take no part: their logits are minus infinity before the softmax, so the loss and every gradient are
    those of the unpadded model.
    """

    def __init__(self, decoder: DecoderConfig, config: TransformerConfig, **arguments: Any) -> None:
        super().__init__(
            config=config,
            max_sequence_length=decoder.max_position_embeddings,
            share_embeddings_and_output_weights=decoder.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=decoder.rotary_base,
            **arguments,
        )
        _mark_slices(self)
        rank, size = self.pg_collection.tp.rank(), self.pg_collection.tp.size()
        first, last = VocabUtility.vocab_range_from_global_vocab_size(self.vocab_size, rank, size)
        self.real_vocabulary_rows = min(max(decoder.vocab_size - first, 0), last - first)

    def settle(self) -> None:
        """Write back, before the weights are read, what was trained beside the matrix it belongs to: here nothing."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy a token, not reduced: labels [b, s], logits [s, b, v / tp] -> [b, s]."""
        # Past autograd: the softmax sends exactly nothing back to minus infinity, and recording the assignment would
        # copy the gradient of all logits, the step's largest tensor.
        logits.detach()[..., self.real_vocabulary_rows :] = -torch.inf
        return super().compute_language_model_loss(labels, logits)


def _mark_slices(model: nn.Module) -> None:
    """Mark the parameters that are slices over the tensor-parallel ranks.

    megatron-core does it only together with its own initialisation, which is off here; without the mark the norm of
    the gradient counts the slices of the first rank alone.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)


def build_decoder(
    decoder: DecoderConfig,
    provider: BackendSpecProvider,
    vocab_divisor: int,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> Decoder:
    """One pipeline chunk of the decoder, with uninitialised weights on this process's device."""
    layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
    return Decoder(
        decoder,
        config,
        transformer_layer_spec=decoder_block(provider, layers),
        vocab_size=padded_vocab_size(decoder.vocab_size, vocab_divisor, groups.tp.size()),
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=groups,
        vp_stage=vp_stage,
    )


def padded_vocab_size(vocab_size: int, divisor: int, tensor_parallel: int) -> int:
    """The rows that the embedding holds: the next multiple of `divisor` times the tensor-parallel ranks."""
    step = divisor * tensor_parallel
    return -(-vocab_size // step) * step
