"""One pipeline chunk of InfiMM: the decoder with gated blocks, and on the first stage the resampler before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.model import Decoder, padded_vocab_size
from megavlm.model.empty import build_empty
from megavlm.model.infimm.config import InfiMMConfig
from megavlm.model.infimm.new_tokens import NewInputRows, NewOutputRows
from megavlm.model.infimm.spec import ChunkLayers, infimm_block
from megavlm.model.media_rows import append_latents, split_latents
from megavlm.model.resampler import Resampler
from megavlm.model.towers import mark_vision_parallel


@dataclass(frozen=True)
class MediaInput:
    """What a chunk needs to know of a microbatch's images."""

    token_map: Tensor
    """[2, s, b]: each token's image (-1: none), and whether its sample has one."""
    images: int
    """Images of the microbatch."""
    features: Callable[[], Tensor] | None = None
    """First stage only, and asked by its first chunk alone: the tower's features of the images that this rank
    resamples, [own images, tokens, width]."""
    gather: Callable[[Tensor], Tensor] | None = None
    """From the latents of its own images to those of all, in order; first stage only."""
    latents: Tensor | None = None
    """[rows, 1, width], first stage only: what `media_latents` gave before; features and gather are then not asked."""


class InfiMM(Decoder):
    """The decoder of one chunk; latents arrive from the resampler or, behind the first stage, with the text."""

    def __init__(
        self,
        decoder: DecoderConfig,
        parts: InfiMMConfig,
        config: TransformerConfig,
        train_new_tokens: bool,
        **arguments: Any,
    ) -> None:
        super().__init__(decoder, config, **arguments)
        self.parts = parts
        self._received: Tensor | None = None
        if self.pre_process:
            device = torch.device(torch.cuda.current_device())
            self.resampler = build_empty(lambda: Resampler(parts.resampler), device, config.params_dtype)
            mark_vision_parallel(self.resampler)
        self.new_input: NewInputRows | None = None
        self.new_output: NewOutputRows | None = None
        if train_new_tokens:
            self._add_new_tokens(parts.new_tokens)

    def _add_new_tokens(self, token_ids: tuple[int, ...]) -> None:
        first_row = self.pg_collection.tp.rank() * (self.vocab_size // self.pg_collection.tp.size())
        if self.pre_process:
            self.new_input = NewInputRows(token_ids, self.config, first_row)
        if self.post_process:
            self.new_output = NewOutputRows(token_ids, self.config, first_row)
            self.new_output.watch(self.output_layer)

    def take_new_rows(self) -> None:
        """Start the new tokens' rows from those of the vocabulary, once that is filled."""
        if self.new_input is not None:
            self.new_input.take_from(self.embedding.word_embeddings.weight, self.pg_collection.tp)
        if self.new_output is not None:
            self.new_output.take_from(self.output_layer.weight, self.pg_collection.tp)

    def settle(self) -> None:
        """Merge the new tokens' rows into the vocabulary."""
        if self.new_input is not None:
            self.new_input.merge_into(self.embedding.word_embeddings.weight)
        if self.new_output is not None:
            self.new_output.merge_into(self.output_layer.weight)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Keep what the stage before sent: it is taken apart in `forward`, which knows the text's length."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, input_ids: Tensor, *arguments: Any, media: MediaInput, **keywords: Any) -> Tensor:
        latents = self._latents(input_ids.size(1), media)
        block_arguments = {"context": latents, "context_mask": media.token_map}
        if self.new_input is not None:
            keywords["decoder_input"] = self.new_input(self.embedding(input_ids, None), input_ids)
        output: Tensor = super().forward(input_ids, *arguments, extra_block_kwargs=block_arguments, **keywords)
        return output if self.post_process else append_latents(output, latents)

    def media_latents(self, media: MediaInput) -> Tensor:
        """[rows, 1, width]: the latents of all images, from the tower's features; first stage only."""
        if media.latents is not None:
            return media.latents
        assert media.features is not None and media.gather is not None
        latents: Tensor = media.gather(self.resampler(media.features()))
        return latents.flatten(0, 1).unsqueeze(1)

    def _latents(self, text_length: int, media: MediaInput) -> Tensor:
        """[rows, 1, width]: this rank's slice under sequence parallelism, else all."""
        if self.pre_process:
            latents = self.media_latents(media)
            if torch.is_grad_enabled() and not latents.requires_grad:
                # With a frozen resampler nothing before the first gated block needs a gradient, and full recompute
                # drops the gradients of everything behind an input that needs none, without a word.
                latents.requires_grad_()
            return scatter_to_sequence_parallel_region(latents) if self.config.sequence_parallel else latents
        assert self._received is not None
        share = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        rows = media.images * self.parts.resampler.num_latents // share
        shape = (rows, 1, self.parts.resampler.width)
        hidden, latents = split_latents(self._received, text_length // share, shape)
        self.decoder.set_input_tensor(hidden)
        return latents


def build_infimm(
    decoder: DecoderConfig,
    parts: InfiMMConfig,
    train_new_tokens: bool,
    provider: BackendSpecProvider,
    vocab_divisor: int,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> InfiMM:
    """One pipeline chunk, with uninitialised weights on this process's device."""
    stage = groups.pp.rank()
    layers = ChunkLayers(
        get_transformer_layer_offset(config, vp_stage, stage), get_num_layers_to_build(config, vp_stage, stage)
    )
    return InfiMM(
        decoder,
        parts,
        config,
        train_new_tokens,
        transformer_layer_spec=infimm_block(provider, parts, layers),
        vocab_size=padded_vocab_size(decoder.vocab_size, vocab_divisor, groups.tp.size()),
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
