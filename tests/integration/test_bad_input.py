"""A user's mistake ends in one line on one rank and exit code 2 on all, within seconds, with no hang."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megavlm.cli import main
from megavlm.testing import spawn

TINY = ["--train-iters", "1"]


def run_command(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what it wrote to standard error) of one rank."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    return code, errors.getvalue()


def the_one_line(outcomes: list[tuple[int, str]]) -> str:
    """What the one rank that spoke said, when all is as it should be."""
    assert [code for code, _ in outcomes] == [2] * len(outcomes)
    spoke = [text for _, text in outcomes if text]
    assert len(spoke) == 1, spoke
    assert spoke[0].startswith("megavlm: error: ")
    assert spoke[0].count("\n") == 1, spoke[0]
    return spoke[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good Hugging Face folder of the tiny recipe, exported by two ranks."""
    target = tmp_path_factory.mktemp("good") / "hf"
    outcomes = spawn(run_command, 2, ["train", "decoder-tiny", *TINY, "--export-hf", str(target)])
    assert outcomes == [(0, ""), (0, "")]
    return target


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--tensor-model-parallel-size", "3"], ["= 3", "does not divide 4 attention heads", "use 2 or 4"]),
        (
            ["--pipeline-model-parallel-size", "3"],
            ["pipeline_model_parallel_size = 3", "4 layers", "use 2 or 4"],
        ),
        (["--tensor-model-parallel-size", "4"], ["'4 x 1'", "2 processes do not divide", "multiple of 4"]),
        (["--num-virtual-stages-per-pipeline-rank", "2"], ["needs more than one pipeline stage"]),
        (["--pipeline-model-parallel-layout", "Ett|tL"], ["3 layers (t), the model has 4", "EttttL"]),
        (["--global-batch-size", "15"], ["= 15", "2 data-parallel ranks", "use 8 or 16"]),
        (["--seq-length", "63", "--sequence-parallel", "--tensor-model-parallel-size", "2"], ["= 63", "use 62"]),
        (["--seq-length", "257"], ["257", "positions of 256"]),
        (["--tensor-model-parallel", "2"], ["--tensor-model-parallel ", "did you mean --tensor-model-parallel-size?"]),
        (["--lr", "fast"], ["--lr", "'fast'", "must be a finite number"]),
        (["--seed", "9" * 30], ["--seed", "is no seed"]),
        (["--lr", "-1"], ["--lr", "-1.0", "must be positive"]),
        (["--fp8-format", "hybrid"], ["--fp8-format", "'hybrid'", "this CPU has no GPU", "bfloat16"]),
        (["--transformer-impl", "transformer_engine"], ["not installed here", "megavlm[gpu]"]),
        (["--trainable", "cross_attention"], ["('cross_attention',)", "names no part of this model", "use decoder"]),
        (["--export-hf", "/proc/nowhere/hf"], ["/proc/nowhere/hf", "cannot be written"]),
        (
            ["--recompute-granularity", "full", "--recompute-num-layers", "3"],
            ["--recompute-num-layers = 3", "a chunk of 4 layers", "use 2 or 4"],
        ),
        (["--load-hf", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--export-hf", ""], ["--export-hf", "is empty", "name a folder"]),
    ],
)
def test_wrong_options(options: list[str], expected: list[str]) -> None:
    line = the_one_line(spawn(run_command, 2, ["train", "decoder-tiny", *TINY, *options], timeout=60))
    assert all(part in line for part in expected), line


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def drop_one_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def widen_one_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].repeat(2)
    save_file(tensors, folder / "model.safetensors")


def claim_another_depth(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


@pytest.mark.parametrize(
    "damage, expected",
    [
        (remove_weights, ["model.safetensors"]),
        (truncate_weights, ["model.safetensors", "again"]),
        (drop_one_tensor, ["model.layers.2.mlp.up_proj.weight", "1 of 39 tensors are missing"]),
        (widen_one_tensor, ["model.norm.weight = (192,)", "the shape (96,)"]),
        (claim_another_depth, ["config.json: num_layers = 3", "the run's decoder has 4"]),
    ],
)
def test_damaged_folders(damage: Callable[[Path], None], expected: list[str], folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "hf"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    damage(broken)
    command = ["train", "decoder-tiny", *TINY, "--load-hf", str(broken), "--pipeline-model-parallel-size", "2"]
    line = the_one_line(spawn(run_command, 2, command, timeout=60))
    assert all(part in line for part in expected), line


def test_under_torchrun() -> None:
    """The whole chain once: torchrun's exit code is not zero, and the line stands once among its own words."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--nproc-per-node", "2", "-m", "megavlm", "train", "decoder-tiny", "--no-such-option", "1"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode != 0
    assert done.stderr.count("megavlm: error: --no-such-option") == 1, done.stderr
    assert "exitcode: 2" in done.stderr.replace("exitcode  : 2", "exitcode: 2")
