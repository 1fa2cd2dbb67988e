"""The drawings of a plan's page, as SVG without text: bars, the timeline of a pipeline, lines over numbers of GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from html import escape

from megavlm.plan.evaluation import SLACK, Evaluation, needed_bytes
from megavlm.plan.pipeline import Pipeline, Timed
from megavlm.plan.profile import MemoryUse
from megavlm.plan.scale import ScalePoint

SLACK_NAME = "slack"
WIDTH, HEIGHT = 1000, 10
"""Units of a bar."""
MOST_PASSES = 1500
"""Of the timeline that are drawn at either end; what is between is left out."""
CHART_WIDTH, CHART_HEIGHT = 600, 160


def memory_parts(memory: MemoryUse) -> list[tuple[str, float]]:
    """(name, bytes) of all that a GPU holds, the allocator's slack last."""
    held = [(field.name, float(getattr(memory, field.name))) for field in fields(memory)]
    return [*held, (SLACK_NAME, SLACK * memory.total)]


def memory_scale(one: Evaluation) -> float:
    """Bytes that the full width of a bar stands for."""
    return max(one.cluster.chip.memory_bytes, *map(needed_bytes, one.memory)) * 1.02


def bar(parts: Sequence[tuple[str, float]], whole: float, label: str, mark: float | None = None) -> str:
    """Parts side by side, (class, size) each, out of the whole; with a line at `mark`."""
    drawn, first = [], 0.0
    for name, size in parts:
        width = WIDTH * size / whole
        if width > 0:
            drawn.append(f'<rect class="{name}" x="{first:.2f}" width="{width:.2f}" height="{HEIGHT}"/>')
        first += width
    if mark is not None:
        drawn.append(f'<path class="mark" d="M{WIDTH * mark / whole:.2f} 0V{HEIGHT}"/>')
    return (
        f'<svg class="bar" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' preserveAspectRatio="none"><title>{escape(label)}</title>{"".join(drawn)}</svg>'
    )


def timeline(pipeline: Pipeline) -> str:
    """A lane for each stage; of many passes the first and the last."""
    passes = sorted(pipeline.timeline, key=lambda timed: timed.start)
    end = max(timed.end for timed in passes)
    if len(passes) <= 2 * MOST_PASSES:
        return _window(pipeline, passes, 0.0, end, "")
    first, last = passes[MOST_PASSES].start, passes[-MOST_PASSES].start
    early = [timed for timed in passes if timed.start < first]
    late = [timed for timed in passes if timed.end > last]
    return (
        _window(pipeline, early, 0.0, first, f"the first {first:.2f} s")
        + f'<p class="cut">{last - first:.2f} s like this</p>'
        + _window(pipeline, late, last, end, f"the last {end - last:.2f} s")
    )


def _window(pipeline: Pipeline, passes: Sequence[Timed], first: float, last: float, what: str) -> str:
    lanes = "".join(_lane(pipeline, stage, passes, first, last) for stage in range(pipeline.shape.stages))
    caption = f'<p class="axis"><span>{first:.2f} s</span><span>{what}</span><span>{last:.2f} s</span></p>'
    return f'<div class="wide"><div class="timeline">{lanes}{caption}</div></div>'


def _lane(pipeline: Pipeline, stage: int, passes: Sequence[Timed], first: float, last: float) -> str:
    scale = WIDTH / (last - first)
    own = (timed for timed in passes if timed.stage == stage)
    drawn = "".join(_rectangle(pipeline, timed, first, last, scale) for timed in own)
    return (
        f'<div class="lane"><b>stage {stage}</b><svg class="bar" role="img" aria-label="Stage {stage} over time"'
        f' viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">'
        f'<rect class="p-idle" width="{WIDTH}" height="{HEIGHT}"/>{drawn}</svg></div>'
    )


def _rectangle(pipeline: Pipeline, timed: Timed, first: float, last: float, scale: float) -> str:
    start, end = max(timed.start, first), min(timed.end, last)
    if end <= start:
        return ""
    run = timed.run
    light = " light" if run.microbatch % 2 else ""
    chunk = f", chunk {run.chunk // pipeline.shape.stages}" if pipeline.shape.chunks > 1 else ""
    said = f"{run.way} {run.microbatch}{chunk}: {timed.end - timed.start:.3f} s"
    return (
        f'<rect class="p-{run.way}{light}" x="{(start - first) * scale:.2f}" width="{(end - start) * scale:.2f}"'
        f' height="{HEIGHT}"><title>{said}</title></rect>'
    )


def scale_chart(points: Sequence[ScalePoint]) -> str:
    """MFU over numbers of GPUs, the latter doubled from mark to mark."""
    found = [(point.gpus, point.evaluation.mfu) for point in points if point.evaluation]
    if len(found) < 2:
        return ""
    highest = math.ceil(max(mfu for _, mfu in found) * 10) / 10
    few, many = math.log2(found[0][0]), math.log2(found[-1][0])
    places = [
        (CHART_WIDTH * (math.log2(gpus) - few) / (many - few), CHART_HEIGHT * (1 - mfu / highest))
        for gpus, mfu in found
    ]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    grid = "".join(f'<path class="grid" d="M0 {y:.1f}H{CHART_WIDTH}"/>' for y in _grid(highest))
    # Of no length and with round ends: a dot of the same size whatever the drawing is stretched to.
    dots = "".join(
        f'<path class="dot" d="M{x:.1f} {y:.1f}h0"><title>{gpus:,} GPUs: {mfu:.1%}</title></path>'
        for (x, y), (gpus, mfu) in zip(places, found, strict=True)
    )
    return (
        f'<div class="chart"><p class="axis"><span>MFU {highest:.0%}</span></p>'
        f'<svg role="img" aria-label="MFU over GPUs" viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}"'
        f' preserveAspectRatio="none">{grid}<path class="line" d="M{line}"/>{dots}</svg>'
        f'<p class="axis"><span>{found[0][0]:,} GPUs</span><span>{found[-1][0]:,} GPUs</span></p></div>'
    )


def _grid(highest: float) -> Iterator[float]:
    for tenth in range(round(highest * 10) + 1):
        yield CHART_HEIGHT * (1 - tenth / 10 / highest)
