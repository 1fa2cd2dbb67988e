"""What a row costs in each part of a run's model, for cutting the layers into pipeline stages.

In multiples of a forward pass's matrix products: a trained part costs three (forward, gradient of the input, gradient
of the weights), a frozen one inside the graph two, and the frozen tower, which nothing flows back into, one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.build.run_config import AquilaVLConfig, InfiMMConfig, RunConfig
from megavlm.model.flops import attention_flops, eva_flops, product_flops, siglip_flops
from megavlm.parallel.split import as_layout, balanced_split


@dataclass(frozen=True)
class RowCosts:
    """Cost of one row: by decoder layer with its gated block, and at both ends."""

    layers: list[float]
    before: float
    behind: float


def row_costs(run: RunConfig, images_per_row: float) -> RowCosts:
    """The cost of a row of full length with this many images, or tiles."""
    decoder, length = run.decoder, run.train.seq_length
    query_width = decoder.num_attention_heads * decoder.kv_channels
    key_width = decoder.num_query_groups * decoder.kv_channels
    layer = (
        product_flops(length, decoder.hidden_size, query_width + 2 * key_width)
        + attention_flops(length, length, query_width)
        + product_flops(length, query_width, decoder.hidden_size)
        + 3 * product_flops(length, decoder.hidden_size, decoder.ffn_hidden_size)
    )
    of_decoder = 3 if "decoder" in run.trainable else 2
    output = of_decoder * product_flops(length, decoder.hidden_size, decoder.vocab_size)
    layers = [float(of_decoder * layer)] * decoder.num_layers
    if run.aquila_vl is not None:
        return RowCosts(layers, _before_text(run, run.aquila_vl, images_per_row), output)
    if run.infimm is None:
        return RowCosts(layers, 0.0, output)
    gated = 3 if "cross_attention" in run.trainable else 2
    block = gated * _gated_block(run, run.infimm, images_per_row)
    stands_before = run.infimm.cross_attention.stands_before
    layers = [cost + (block if stands_before(number) else 0.0) for number, cost in enumerate(layers, 1)]
    # Ahead of the schedule the tower is everybody's work, not the first stage's.
    tower = 0.0 if run.parallel.vision_over == "all_stages" else images_per_row * eva_flops(run.infimm.tower, 1)
    of_resampler = 3 if "resampler" in run.trainable else 2
    return RowCosts(layers, tower + of_resampler * images_per_row * _resampler(run.infimm), output)


def balanced_layout(run: RunConfig, images_per_row: float) -> str:
    """The layout, in Megatron's letters, whose costliest chunk is the cheapest."""
    costs = row_costs(run, images_per_row)
    return as_layout(balanced_split(costs.layers, run.parallel.chunks, costs.before, costs.behind))


def _before_text(run: RunConfig, parts: AquilaVLConfig, tiles_per_row: float) -> float:
    """Tower and projector, which nothing flows back into where both are frozen."""
    width, hidden, tokens = parts.tower.width, run.decoder.hidden_size, parts.tower.tokens
    of_projector = 3 if "projector" in run.trainable else 2 if "tower" in run.trainable else 1
    projector = of_projector * (product_flops(tokens, width, hidden) + product_flops(tokens, hidden, hidden))
    if run.parallel.vision_over == "all_stages":
        return tiles_per_row * projector
    of_tower = 3 if "tower" in run.trainable else 1
    return tiles_per_row * (projector + of_tower * siglip_flops(parts.tower, 1))


def _gated_block(run: RunConfig, parts: InfiMMConfig, images_per_row: float) -> float:
    length, hidden, settings = run.train.seq_length, run.decoder.hidden_size, parts.cross_attention
    latents = parts.resampler.num_latents
    return (
        2 * product_flops(length, hidden, settings.inner_width)
        + images_per_row * product_flops(latents, parts.tower.width, 2 * settings.inner_width)
        + attention_flops(length, latents, settings.inner_width)
        + 2 * product_flops(length, hidden, settings.ff_multiple * hidden)
    )


def _resampler(parts: InfiMMConfig) -> int:
    """One image."""
    settings, tokens = parts.resampler, parts.tower.tokens
    latents, width, inner = settings.num_latents, settings.width, settings.heads * settings.head_width
    return settings.depth * (
        2 * product_flops(latents, width, inner)
        + product_flops(tokens + latents, width, 2 * inner)
        + attention_flops(latents, tokens + latents, inner)
        + 2 * product_flops(latents, width, settings.mlp_ratio * width)
    )
