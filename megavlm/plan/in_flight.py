"""In which order a pipeline stage runs its microbatches forward and backward, and how much then lives at once.

The order is that of megatron-core's schedules: first so many forward passes as the stages behind need to begin, then
forward and backward in turn, then the backward passes that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Pass(NamedTuple):
    """A forward or backward pass of one chunk."""

    is_forward: bool
    chunk: int


class ChunkMemory(NamedTuple):
    """Bytes of one microbatch in one chunk."""

    held: int
    """From its forward pass to its backward pass."""
    forward_peak: int
    """The most that lives during the forward pass, over what lived before."""
    backward_peak: int
    """Likewise, over what lives without this microbatch."""


def passes(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Pass]:
    """All passes of a step on one stage, in order."""
    order = list(_chunk_order(stages, chunks, microbatches))
    warmup = (stages - stage - 1) if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    warmup = min(warmup, len(order))
    for chunk in order[:warmup]:
        yield Pass(True, chunk)
    for ahead, chunk in enumerate(order[warmup:]):
        yield Pass(True, chunk)
        yield Pass(False, chunks - 1 - order[ahead])
    for chunk in order[len(order) - warmup :]:
        yield Pass(False, chunks - 1 - chunk)


def _chunk_order(stages: int, chunks: int, microbatches: int) -> Iterator[int]:
    """The chunk of each forward pass: as many microbatches as there are stages through each chunk in turn."""
    if chunks == 1:
        yield from [0] * microbatches
        return
    for first in range(0, microbatches, stages):
        for chunk in range(chunks):
            yield from [chunk] * min(stages, microbatches - first)


def most_in_flight(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    """Passes whose backward is still to come, at most."""
    most = now = 0
    for one in passes(stage, stages, chunks, microbatches):
        now += 1 if one.is_forward else -1
        most = max(most, now)
    return most


def peak_bytes(chunks: Sequence[ChunkMemory], stage: int, stages: int, microbatches: int) -> int:
    """The most that lives at once during the passes of a step."""
    most = now = 0
    for one in passes(stage, stages, len(chunks), microbatches):
        memory = chunks[one.chunk]
        if one.is_forward:
            most = max(most, now + memory.forward_peak)
            now += memory.held
        else:
            now -= memory.held
            most = max(most, now + memory.backward_peak)
    return most
