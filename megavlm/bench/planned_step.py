"""What a plan says of a step on this CPU against the step itself, of decoders that are not the one it is calibrated on.

Before each run the machine is measured anew, since its speed changes: the prediction rests on what was measured last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from megavlm.bench.decoder_step import run_of
from megavlm.bench.harness import THREADS, Comparison, Pass, Side, SkippedError
from megavlm.build.run_config import ParallelConfig, RunConfig
from megavlm.data.toy_world.world import SampleKind
from megavlm.parallel import groups as parallel_groups
from megavlm.parallel.groups import Groups
from megavlm.plan.calibrate import Meter
from megavlm.plan.cluster import Cluster
from megavlm.plan.judge import timed
from megavlm.plan.mix import Mix, mix_of
from megavlm.plan.profile import StageProfile
from megavlm.plan.stage import profile_run
from megavlm.recipes import recipe
from megavlm.toy.data import prepare_toy_data
from megavlm.toy.tokenizer import write_tokenizer
from megavlm.train.feed import feed
from megavlm.train.training import build_training

TOYS: tuple[SampleKind, ...] = ("pairs", "documents")
"""What infimm-tiny/pretrain reads."""
TARGET = 1.2
"""And not below its inverse."""


@dataclass(frozen=True)
class _Planned:
    """A run, traced."""

    run: RunConfig
    mix: Mix
    profiles: list[StageProfile]
    steps: int
    """Of each pass."""

    @property
    def parameters(self) -> int:
        return sum(profile.parameters for profile in self.profiles)

    def predicted(self, cluster: Cluster) -> Pass:
        """What the plan says of a step on the machine as it was measured."""
        assert cluster.efficiency is not None
        step = timed(self.run, cluster, self.mix, self.profiles, cluster.efficiency)
        return Pass(step.seconds, self.parameters)

    def measured(self, groups: Groups) -> Iterator[Pass]:
        """The middle one of some iterations of training, what they wait for data included."""
        training = build_training(self.run, groups)
        steps = feed(self.run, training.model, groups, 0)
        real = sum(parameter.numel() for part in training.model.parts() for parameter in part.parameters())
        while True:
            taken = []
            for _ in range(self.steps):
                began = time.perf_counter()
                training.step(next(steps), 0)
                taken.append(time.perf_counter() - began)
            yield Pass(median(taken), real)


def _planned(run: RunConfig, steps: int) -> _Planned:
    mix = mix_of(run, from_data=run.data is not None)
    return _Planned(run, mix, profile_run(run, 1, round(mix.rows), mix.traced), steps)


def _with_toys(run: RunConfig, folder: Path) -> RunConfig:
    """The run on pictures and words of the toy world."""
    assert run.data is not None
    write_tokenizer(folder / "tokenizer")
    prepare_toy_data(folder / "data", folder / "tokenizer", samples=dict.fromkeys(TOYS, 200))
    return run.replace(
        data=run.data.replace(path=str(folder / "data"), tokenizer=str(folder / "tokenizer")),
    )


@contextmanager
def planned_step(quick: bool) -> Iterator[tuple[Comparison, ...]]:
    """A comparison for each run: the plan's seconds are ours, those of the run theirs; both count its parameters."""
    if torch.cuda.is_available():
        raise SkippedError("it plans steps of a CPU")
    torch.set_num_threads(THREADS)
    parallel_groups.leave()  # a trace imagines the others, and may have joined none
    with TemporaryDirectory() as folder:
        cases = [_planned(run_of(quick), 1 if quick else 3)]
        if not quick:  # whose traces take a minute
            pictures = _with_toys(recipe("infimm-tiny/pretrain"), Path(folder))
            cases = [_planned(recipe("decoder-tiny"), 20), _planned(pictures, 3), *cases]
        parallel_groups.join()
        groups = parallel_groups.start(ParallelConfig())
        meter = Meter(groups, quick)
        try:
            yield tuple(_comparison(case, groups, meter, quick) for case in cases)
        finally:
            parallel_groups.stop()


def _comparison(case: _Planned, groups: Groups, meter: Meter, quick: bool) -> Comparison:
    passes = case.measured(groups)
    run = case.run
    return Comparison(
        benchmark="planned-step",
        case=(
            f"seconds of a step of {run.name} ({case.parameters / 1e6:.1f}M parameters, {case.mix.tokens:,.0f} tokens) "
            f"as planned, calibrated on a 20M decoder right before, against {case.steps} real ones"
        ),
        ours=Side(f"{run.name} planned", lambda: case.predicted(meter.cluster())),
        theirs=Side(f"{run.name} measured", lambda: next(passes)),
        target=TARGET,
        rounds=2 if quick else 5,
        warmup=1,
        tolerance=0.0,
    )
