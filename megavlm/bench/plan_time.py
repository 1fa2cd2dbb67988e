"""The planner itself: how long `megavlm plan` takes for a 13B model on 40 GPUs, and how much memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megavlm.bench.harness import Figure, Measurement, figure
from megavlm.bench.processes import megavlm_command, watched

SECONDS, SECONDS_OF_A_SEARCH, GIGABYTES = 30.0, 60.0, 4.0
"""At most, on two cores."""


@contextmanager
def plan_time(quick: bool) -> Iterator[tuple[Measurement, ...]]:
    """The command as a process of its own; once in a given layout, once with the search for one."""
    rounds = 1 if quick else 3
    if quick:
        tiny = ("decoder-tiny", "--cluster", "1x2xA100-80GB", "--tensor-model-parallel-size", "2")
        yield (_measurement(tiny, SECONDS, rounds),)
        return
    asked = ("infimm-llama2-13b/pretrain", "--cluster", "5x8xA100-80GB")
    layout = ("--tensor-model-parallel-size", "8")
    yield _measurement((*asked, *layout), SECONDS, rounds), _measurement(asked, SECONDS_OF_A_SEARCH, rounds)


def _measurement(arguments: Sequence[str], target: float, rounds: int) -> Measurement:
    def measure() -> Sequence[Figure]:
        runs = [watched(megavlm_command("plan", *arguments)) for _ in range(rounds)]
        return [
            figure("until the answer", "s", [run.seconds for run in runs], target),
            figure("memory at most", "GB", [run.peak / 1e9 for run in runs], GIGABYTES),
        ]

    return Measurement("plan", f"megavlm plan {' '.join(arguments)}; {rounds} times", measure)
