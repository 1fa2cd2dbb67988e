"""What a run's model costs, part by part, in floating-point operations of a training step: products alone.

One table for all who ask: throughput and MFU, and where the layers are cut into pipeline stages. A product is computed
once forward, once more for each factor that a gradient flows to; what is recomputed to save memory does not count. So
a trained part costs its forward pass three times; a frozen one in front of all that learns (the tower, most often)
once; a frozen one behind something that learns twice, but for attention, both of whose factors come from before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.build.run_config import AquilaVLConfig, InfiMMConfig, RunConfig
from megavlm.model.flops import (
    Flops,
    causal_pairs,
    eva_flops,
    gated_block_flops,
    layer_flops,
    product_flops,
    resampler_flops,
    siglip_flops,
    siglip_patch_flops,
)
from megavlm.parallel.split import as_layout, balanced_split
from megavlm.platform import machine
from megavlm.platform.device import bf16_peak_tflops


@dataclass(frozen=True, kw_only=True)
class Work:
    """What passes through a model."""

    tokens: float
    """Of text, those that stand for pictures included where they have places in the row."""
    pairs: float
    """Pairs of tokens that see each other in the decoder."""
    tiles: float = 0
    """What the tower sees."""
    seeing_tokens: float = 0
    """Tokens that attend to a picture's latents."""


@dataclass(frozen=True)
class PartCosts:
    """A step, by part; lists by decoder layer."""

    tower: float
    connector: float
    layers: list[float]
    gated: list[float]
    """The gated block before each layer, 0 where none stands."""
    head: float

    @property
    def by_name(self) -> dict[str, float]:
        return {
            "tower": self.tower,
            "connector": self.connector,
            "cross-attention": sum(self.gated),
            "decoder": sum(self.layers),
            "head": self.head,
        }

    @property
    def total(self) -> float:
        return sum(self.by_name.values())


def causal_work(tokens: float, squares: float, tiles: float, seeing_tokens: float) -> Work:
    """Of packed documents, `squares` being the sum of the squares of their lengths."""
    return Work(tokens=tokens, pairs=causal_pairs(tokens, squares), tiles=tiles, seeing_tokens=seeing_tokens)


def part_costs(run: RunConfig, work: Work) -> PartCosts:
    """What a step of this run costs."""
    if run.infimm is not None:
        return _infimm(run, run.infimm, work)
    tower, connector = (0.0, 0.0) if run.aquila_vl is None else _aquila_vl_eyes(run, run.aquila_vl, work)
    layer = layer_flops(run.decoder, work.tokens, work.pairs).of_step(flows=True, learns="decoder" in run.trainable)
    layers = run.decoder.num_layers
    return PartCosts(tower, connector, [layer] * layers, [0.0] * layers, _head(run, work))


def peak_tflops(run: RunConfig) -> float | None:
    """What this process's chip could compute at best, in TFLOP/s; None where neither the run nor its name says it."""
    return run.log.peak_tflops or bf16_peak_tflops(machine.chip()[0])


@dataclass(frozen=True)
class RowCosts:
    """Cost of one row: by decoder layer with its gated block, and at both ends."""

    layers: list[float]
    before: float
    behind: float


def row_costs(run: RunConfig, images_per_row: float) -> RowCosts:
    """The cost of a row of full length with this many images, or tiles."""
    length = run.row_tokens
    seeing = length if images_per_row else 0
    costs = part_costs(run, causal_work(length, length**2, images_per_row, seeing))
    # Ahead of the schedule the tower is everybody's work, not the first stage's.
    tower = 0.0 if run.parallel.vision_over == "all_stages" else costs.tower
    layers = [layer + gated for layer, gated in zip(costs.layers, costs.gated, strict=True)]
    return RowCosts(layers, tower + costs.connector, costs.head)


def balanced_layout(run: RunConfig, images_per_row: float) -> str:
    """The layout, in Megatron's letters, whose costliest chunk is the cheapest."""
    costs = row_costs(run, images_per_row)
    return as_layout(balanced_split(costs.layers, run.parallel.chunks, costs.before, costs.behind))


def _head(run: RunConfig, work: Work) -> float:
    decoder = run.decoder
    output = Flops(product_flops(work.tokens, decoder.hidden_size, decoder.vocab_size))
    head = output.of_step(flows=True, learns="decoder" in run.trainable)
    if "new_tokens" in run.trainable:  # two rows of their own, beside the frozen ones
        head += Flops(product_flops(work.tokens, decoder.hidden_size, 2)).of_step(flows=True, learns=True)
    return head


def _infimm(run: RunConfig, parts: InfiMMConfig, work: Work) -> PartCosts:
    """The tower is always frozen; so in front of the first gated block a frozen decoder runs forward alone, unless the
    new tokens' rows learn.
    """
    resampler, settings = parts.resampler, parts.cross_attention
    block = gated_block_flops(
        settings,
        run.decoder.hidden_size,
        resampler.width,
        tokens=work.tokens,
        latents=work.tiles * resampler.num_latents,
        pairs=work.seeing_tokens * resampler.num_latents,
    ).of_step(flows=True, learns="cross_attention" in run.trainable)
    resampled = resampler_flops(resampler, parts.tower.tokens, work.tiles)
    resampler_learns, decoder_learns = "resampler" in run.trainable, "decoder" in run.trainable
    from_start = decoder_learns or "new_tokens" in run.trainable
    layer = layer_flops(run.decoder, work.tokens, work.pairs)
    numbers = range(1, run.decoder.num_layers + 1)
    return PartCosts(
        eva_flops(parts.tower, work.tiles).forward,
        resampled.of_step(flows=resampler_learns, learns=resampler_learns),
        [layer.of_step(flows=from_start or n >= settings.every_n_layers, learns=decoder_learns) for n in numbers],
        [block if settings.stands_before(number) else 0.0 for number in numbers],
        _head(run, work),
    )


def _aquila_vl_eyes(run: RunConfig, parts: AquilaVLConfig, work: Work) -> tuple[float, float]:
    """Tower and projector."""
    hidden, rows = run.decoder.hidden_size, work.tiles * parts.tower.tokens
    tower_learns, learns = "tower" in run.trainable, "projector" in run.trainable
    tower = siglip_flops(parts.tower, work.tiles).of_step(flows=tower_learns, learns=tower_learns)
    if tower_learns:
        tower -= siglip_patch_flops(parts.tower, work.tiles)
    first, second = (Flops(product_flops(rows, width, hidden)) for width in (parts.tower.width, hidden))
    projector = first.of_step(flows=tower_learns, learns=learns)
    return tower, projector + second.of_step(flows=tower_learns or learns, learns=learns)
