"""A toy model from its bases to the answers it gives: all stages as one run on two processes, then the quiz."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megavlm.data.toy_world.world import PictureKind, SampleKind
from megavlm.recipes import recipe, stages_of
from megavlm.toy.bases import FAMILY_BASES
from megavlm.toy.data import KINDS, SAMPLES, prepare_toy_data, toy_world
from megavlm.toy.quiz import Asked, Respondent, Score, quiz
from megavlm.toy.show import losses_in

LOG = Path("loss.jsonl")
"""Of which each stage writes one of its own."""


@dataclass(frozen=True)
class Course:
    """What a course left behind."""

    trained: Path
    """The folder that the last stage exported."""
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
    """Bases, data, all stages of the family's toy as one run, and questions about unseen pictures to its export."""
    watch = _Watch()
    model = f"{family}-tiny"
    base = FAMILY_BASES[family](folder / "base", seed)
    prepare_toy_data(folder / "data", base, seed, family=family, samples=_named(samples, model), workers=2)
    watch.lap("data")
    train_model(model, folder, seed, options)
    watch.lap("training")
    stages = stages_of(model)
    trained = folder / "trained" / stages[-1]
    kinds = tuple(dict.fromkeys(KINDS))
    scores, asked = quiz(Respondent(trained), kinds, toy_world(seed), questions)
    watch.lap("questions")
    losses = {stage: losses_in(folder / f"{LOG.stem}-{stage}{LOG.suffix}") for stage in stages}
    return Course(trained, losses, scores, asked, watch.laps)


def _named(samples: Mapping[SampleKind, int], model: str) -> dict[SampleKind, int]:
    """Of these the data sets that the model's stages learn from."""
    data = [run.data for stage in stages_of(model) if (run := recipe(f"{model}/{stage}")).data is not None]
    names = {source.name for one in data if one for stream in one.streams for source in stream.sources}
    return {kind: count for kind, count in samples.items() if f"toy-{kind}" in names}


def train_model(model: str, folder: Path, seed: int, options: Sequence[str] = ()) -> None:
    """All stages on two processes, from the folder `base` and the data sets below `data` to folders below `trained`."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "megavlm", "train", model, "--tensor-model-parallel-size", "2", "--seed", str(seed)]
    scale = ["--params-dtype", "bfloat16", "data.rows.rows_multiple=1"]
    starts = ["--load-hf", str(folder / "base"), "--data-path", str(folder / "data")]
    ends = ["--save", str(folder / "saved"), "--export-hf", str(folder / "trained"), "--log-json", str(folder / LOG)]
    command, said = [*torchrun, *train, *scale, *starts, *ends, *options], []
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if " iteration " in line:
                print(line, end="", flush=True)
    if process.returncode:
        print("".join(said), file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)


def _environment() -> dict[str, str]:
    """Ours; one thread a process, which keeps its memory: giving it back after each large tensor costs more time.

    Two processes do not share one GPU: they run on the CPU then.
    """
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**26)}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() == 1 else {}
    return {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **kept, **hidden}


class _Watch:
    """Seconds from lap to lap."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
