"""The decoder layer with a gated block before it, and which layers of a chunk are such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megavlm.model.cross_attention import GatedCrossAttention
from megavlm.model.decoder.spec import decoder_layer
from megavlm.model.infimm.config import InfiMMConfig


class GatedLayer(TransformerLayer):
    """A decoder layer that first looks at the images.

    The latents come as megatron-core's `context` and the token map as its `context_mask`: both go through the block
    from layer to layer as tensors, so they are right under recompute and with several microbatches in flight.
    """

    def __init__(self, *arguments: Any, parts: InfiMMConfig, provider: BackendSpecProvider, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        groups: ProcessGroupCollection = keywords["pg_collection"]
        self.gated = GatedCrossAttention(
            parts.cross_attention, self.config, provider, parts.tower.width, parts.resampler.num_latents, groups
        )

    def forward(
        self, hidden_states: Tensor, *, context: Tensor, context_mask: Tensor, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        hidden_states = self.gated(hidden_states, context, context_mask)
        output: tuple[Tensor, Tensor] = super().forward(
            hidden_states=hidden_states, context=context, context_mask=context_mask, **rest
        )
        return output


@dataclass(frozen=True)
class ChunkLayers:
    """Which decoder layers a pipeline chunk holds: `count` of them behind the first `offset`."""

    offset: int
    count: int


def infimm_block(provider: BackendSpecProvider, parts: InfiMMConfig, layers: ChunkLayers) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk, each with its gated block where one stands."""
    plain = decoder_layer(provider)
    gated = ModuleSpec(module=GatedLayer, params={"parts": parts, "provider": provider}, submodules=plain.submodules)
    numbers = range(layers.offset + 1, layers.offset + layers.count + 1)
    return TransformerBlockSubmodules(
        layer_specs=[gated if parts.cross_attention.stands_before(number) else plain for number in numbers],
        layer_norm=provider.layer_norm(rms_norm=True),
    )
