"""A toy model from its bases to the answers it gives: each stage a run of its own on two processes, then the quiz."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megavlm.data.toy_world.world import PictureKind, SampleKind
from megavlm.log import get_logger
from megavlm.recipes import RECIPES, recipe
from megavlm.toy.bases import FAMILY_BASES
from megavlm.toy.data import KINDS, SAMPLES, prepare_toy_data, toy_world
from megavlm.toy.quiz import Asked, Respondent, Score, quiz
from megavlm.toy.show import losses_in

logger = get_logger(__name__)


@dataclass(frozen=True)
class Course:
    """What a course left behind."""

    losses: dict[str, list[tuple[int, float]]]
    """Stage -> (iteration, loss)."""
    scores: dict[PictureKind, Score]
    asked: list[Asked]
    seconds: dict[str, float]
    """What each part of it took."""


def run_course(
    folder: Path,
    seed: int,
    *,
    family: str = "infimm",
    questions: int = 100,
    samples: Mapping[SampleKind, int] = SAMPLES,
    options: Sequence[str] = (),
) -> Course:
    """Bases, data, all stages of the family's toy, and questions about unseen pictures to the folder `trained`."""
    watch = _Watch()
    stages = [name for name in RECIPES if name.startswith(f"{family}-tiny/")]
    start = FAMILY_BASES[family](folder / "base", seed)
    prepare_toy_data(folder / "data", start, seed, family=family, samples=_named(samples, stages), workers=2)
    watch.lap("data")
    losses = {}
    for stage in stages:
        out = folder / ("trained" if stage == stages[-1] else stage.partition("/")[2])
        losses[stage.partition("/")[2]] = train_stage(stage, start, folder / "data", out, seed, options)
        watch.lap(stage)
        start = out
    kinds = tuple(dict.fromkeys(KINDS))
    scores, asked = quiz(Respondent(start), kinds, toy_world(seed), questions)
    watch.lap("questions")
    return Course(losses, scores, asked, watch.laps)


def _named(samples: Mapping[SampleKind, int], stages: Sequence[str]) -> dict[SampleKind, int]:
    """Of these the data sets that the stages learn from."""
    data = [run.data for run in map(recipe, stages) if run.data is not None]
    names = {source.name for one in data for stream in one.streams for source in stream.sources}
    return {kind: count for kind, count in samples.items() if f"toy-{kind}" in names}


def train_stage(
    stage: str, start: Path, data: Path, out: Path, seed: int, options: Sequence[str] = ()
) -> list[tuple[int, float]]:
    """One stage on two processes, from one Hugging Face folder to the next; its (iteration, loss)."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "megavlm", "train", stage, "--tensor-model-parallel-size", "2", "--seed", str(seed)]
    scale = ["--params-dtype", "bfloat16", "data.rows.rows_multiple=1"]
    folders = ["--load-hf", str(start), "--data-path", str(data), "--export-hf", str(out)]
    command, said = [*torchrun, *train, *scale, *folders, *options], []
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if "iteration" in line:
                print(line, end="", flush=True)
    if process.returncode:
        print("".join(said), file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return losses_in("".join(said))


def _environment() -> dict[str, str]:
    """Ours; one thread a process, which keeps its memory: giving it back after each large tensor costs more time."""
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**26)}
    return {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **kept}


class _Watch:
    """Seconds from lap to lap."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
