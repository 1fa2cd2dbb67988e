"""How much lives at once on a pipeline stage, microbatches following one another in the schedule's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megavlm.plan.pipeline_program import Shape, runs_of


class ChunkMemory(NamedTuple):
    """Bytes of one microbatch in one chunk."""

    held: int
    """From its forward pass to its backward pass."""
    forward_peak: int
    """The most that lives during the forward pass, over what lived before."""
    backward_peak: int
    """Likewise, over what lives without this microbatch."""


def peak_bytes(chunks: Sequence[ChunkMemory], stage: int, stages: int, microbatches: int, kept: int = 0) -> int:
    """The most that lives at once during the passes of a step.

    `kept`: of what the last backward pass was given, which lives on beside the forward pass behind it.
    """
    most = now = before = 0
    for run in runs_of(Shape(stages, len(chunks), microbatches), stage):
        memory = chunks[run.chunk // stages]
        if run.way == "forward":
            most = max(most, now + before + memory.forward_peak)
            now += memory.held
        else:
            now -= memory.held
            most = max(most, now + memory.backward_peak)
            before = kept
    return most
