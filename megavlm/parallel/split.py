"""Cutting the layers into pipeline chunks of equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def balanced_split(costs: Sequence[float], chunks: int, before: float = 0.0, behind: float = 0.0) -> list[int]:
    """How many neighbouring layers each chunk takes, so that the costliest chunk costs as little as can be.

    `before` is what the first chunk does beside its layers (the tower, the connector), `behind` what the last does
    (the output layer). A chunk at either end may be left without layers.
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    @cache
    def best(chunk: int, first: int) -> tuple[float, int]:
        """(cost of the costliest, layers of this chunk) for the chunks from this one on, over layers from `first`."""
        extra = before * (chunk == 0) + behind * (chunk == chunks - 1)
        if chunk == chunks - 1:
            return total[-1] - total[first] + extra, len(costs) - first
        least, needed_behind = (0 if chunk == 0 else 1), chunks - 2 - chunk
        options = range(least, len(costs) - first - needed_behind + 1)
        return min((max(total[first + n] - total[first] + extra, best(chunk + 1, first + n)[0]), n) for n in options)

    split, first = [], 0
    for chunk in range(chunks):
        layers = best(chunk, first)[1]
        split.append(layers)
        first += layers
    return split


def as_layout(split: Sequence[int]) -> str:
    """The split in Megatron's letters: E embedding, t layer, L loss, | next chunk."""
    return "E" + "|".join("t" * layers for layers in split) + "L"
