"""Start-up: from the start of `megavlm train decoder-tiny` to the end of its first step, against plain transformers.

A pass starts a process. Ours is the command that a user types; theirs the shortest script around transformers' model
that does the same step from the same folder (`plain_start.py`). Both give the step's loss.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from megavlm.bench.harness import Comparison, Figure, Pass, Side, figure
from megavlm.bench.processes import Done, megavlm_command, watched
from megavlm.build.model import build_model
from megavlm.data.toy_text import toy_step
from megavlm.export.hf_export import export_model
from megavlm.parallel import groups as parallel_groups
from megavlm.recipes import recipe

RECIPE = "decoder-tiny"
MARKS = {
    "until the first word: Python, imports, joining": f"name: {RECIPE}",
    "model and optimizer": f"training {RECIPE} on",
    "first step": "iteration        1/",
}
"""Part of the start-up -> what the log says at its end."""
_LOSS = re.compile(r"lm loss: (\S+)")


@contextmanager
def start_up(quick: bool) -> Iterator[Comparison]:
    """Each pass a process of its own."""
    with TemporaryDirectory() as place:
        folder, tokens = Path(place) / "weights", Path(place) / "tokens.safetensors"
        _write(folder, tokens)
        ours = _Ours(folder)
        yield Comparison(
            benchmark="start-up",
            case=f"from the start of the process to the end of the first step of {RECIPE}, weights from a folder",
            ours=Side("megavlm train", ours.next_pass),
            theirs=Side("transformers", _their_passes(folder, tokens)),
            target=None,  # theirs imports less, and knows no parallelism, data or checkpoints
            rounds=1 if quick else 7,
            warmup=0 if quick else 1,
            figures=ours.parts,
        )


def _write(folder: Path, tokens: Path) -> None:
    """The weights that both sides start from, and the rows of the first step."""
    run = recipe(RECIPE)
    parallel_groups.join()
    groups = parallel_groups.start(run.parallel, run.train.seed)
    try:
        export_model(build_model(run, groups), run, groups, folder)
    finally:
        parallel_groups.stop()
    batches = toy_step(
        seed=run.train.seed,
        step=0,
        global_batch_size=run.samples_per_step,
        micro_batch_size=run.samples_per_step,
        seq_length=run.row_tokens,
        vocab_size=run.decoder.vocab_size,
        data_rank=0,
        data_size=1,
    )
    save_file({"tokens": torch.cat([batch.tokens for batch in batches])}, tokens)


class _Ours:
    """Runs of the command, and when each said what."""

    def __init__(self, folder: Path) -> None:
        self._command = megavlm_command("train", RECIPE, "--load-hf", str(folder), "--train-iters", "1")
        self._command += ["--log-interval", "1"]
        self._runs: list[Done] = []

    def next_pass(self) -> Pass:
        run = watched(self._command)
        self._runs.append(run)
        seconds, line = run.reached(list(MARKS.values())[-1])
        found = _LOSS.search(line)
        assert found is not None, line
        return Pass(seconds, float(found[1]))

    def parts(self) -> Sequence[Figure]:
        """Seconds of each part of the start-up, the warm-up left out."""
        runs = self._runs[1:] or self._runs
        ends = [[0.0, *(run.reached(mark)[0] for mark in MARKS.values())] for run in runs]
        return [figure(name, "s", [end[number + 1] - end[number] for end in ends]) for number, name in enumerate(MARKS)]


def _their_passes(folder: Path, tokens: Path) -> Callable[[], Pass]:
    command = [sys.executable, str(Path(__file__).with_name("plain_start.py")), str(folder), str(tokens)]

    def next_pass() -> Pass:
        seconds, line = watched(command).reached("loss")
        return Pass(seconds, float(line.split()[1]))

    return next_pass
