"""One pipeline chunk of Aquila-VL: the decoder, and on the first stage the projector that brings in the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.batch import AssembleTable
from megavlm.model.aquila_vl.config import AquilaVLConfig
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.model import Decoder, padded_vocab_size
from megavlm.model.decoder.spec import decoder_block
from megavlm.model.empty import build_empty
from megavlm.model.projector import Projector
from megavlm.model.towers import mark_vision_parallel
from megavlm.model.towers.siglip import SiglipTower
from megavlm_kernels import sequence_assemble


@dataclass(frozen=True)
class SplicedInput:
    """What the first stage needs to know of a microbatch's images."""

    features: Callable[[], Tensor]
    """The tower's features of the tiles that this rank projects, [own tiles, tokens, width]."""
    gather: Callable[[Tensor], Tensor]
    """From its own tiles' projected features to those of all, in order."""
    table: AssembleTable
    """Where each position of this rank's text comes from."""


class AquilaVL(Decoder):
    """The decoder of one chunk. On the first stage the tokens of images take the places that are kept for them."""

    def __init__(
        self,
        decoder: DecoderConfig,
        parts: AquilaVLConfig,
        config: TransformerConfig,
        tower: Callable[[], nn.Module] | None,
        **arguments: Any,
    ) -> None:
        """`tower` builds one that is to be trained; a frozen one stays outside, beyond the reach of optimizers."""
        super().__init__(decoder, config, **arguments)
        if not self.pre_process:
            return
        device = torch.device(torch.cuda.current_device())
        self.projector = build_empty(
            lambda: Projector(parts.tower.width, decoder.hidden_size), device, config.params_dtype
        )
        mark_vision_parallel(self.projector)
        self.image_newline = nn.Parameter(torch.empty(decoder.hidden_size, device=device, dtype=config.params_dtype))
        # Each rank adds it to its own slice of the sequence, where the sequence is sliced.
        self.image_newline.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if tower is not None:
            self.tower = build_empty(tower, device, config.params_dtype)
            mark_vision_parallel(self.tower)

    def forward(self, input_ids: Tensor, *arguments: Any, media: SplicedInput | None = None, **keywords: Any) -> Tensor:
        if self.pre_process and media is not None:
            keywords["decoder_input"] = self.embed(input_ids, media)
        output: Tensor = super().forward(input_ids, *arguments, **keywords)
        return output

    def embed(self, input_ids: Tensor, media: SplicedInput) -> Tensor:
        """Tokens [b, s] -> [s, b, h], or this rank's slice of s: text, and images in their places; first stage only."""
        text = self.embedding(input_ids, None)
        features = media.gather(self.projector(media.features()))
        rows = sequence_assemble(
            text.flatten(0, 1), features.flatten(0, 1), self.image_newline, media.table.index, media.table.weight
        )
        if torch.is_grad_enabled() and not rows.requires_grad:
            # Where all this is frozen: full recompute drops the gradients of everything behind an input that needs
            # none, without a word.
            rows.requires_grad_()
        return rows.view_as(text)


def build_aquila_vl(
    decoder: DecoderConfig,
    parts: AquilaVLConfig,
    train_tower: bool,
    recompute_tower: bool,
    provider: BackendSpecProvider,
    vocab_divisor: int,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> AquilaVL:
    """One pipeline chunk, with uninitialised weights on this process's device."""
    return AquilaVL(
        decoder,
        parts,
        config,
        (lambda: SiglipTower(parts.tower, recompute_tower)) if train_tower else None,
        transformer_layer_spec=decoder_block(provider, get_num_layers_to_build(config, vp_stage, groups.pp.rank())),
        vocab_size=padded_vocab_size(decoder.vocab_size, vocab_divisor, groups.tp.size()),
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
