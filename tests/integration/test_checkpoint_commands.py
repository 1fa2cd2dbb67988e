"""A checkpoint asked and exported as a folder is: `generate --load`, `export-hf --load`, `verify-hf --load`."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from infimm_hf import load, offline
from prepared_toys import data_config, prepare_toys, stream
from safetensors.torch import load_file, save_file
from tiny_folders import infimm_folder

from megavlm.build.from_folder import run_from_folder
from megavlm.build.run_config import CheckpointConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megavlm.checkpoint.shelf import checkpoint_path
from megavlm.cli import main
from megavlm.data.chat import ChatConfig
from megavlm.data.toy_world.world import ToyWorld
from megavlm.parallel import groups as process_groups
from megavlm.testing import spawn
from megavlm.train.loop import train

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"
Outcome = tuple[int, str, str]


def train_two_steps(root: Path) -> None:
    """The two new rows of a frozen vocabulary learn, so what is frozen on disk is not the whole truth."""
    process_groups.join()
    data = data_config(root / "data", root / "hf", ChatConfig(template="zephyr"), [stream(["pairs"], 4)])
    run = run_from_folder(root / "hf")
    run = run.replace(
        data=data.replace(tokenizer=None),
        trainable=("cross_attention", "resampler", "new_tokens"),
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        precision=PrecisionConfig(params_dtype="float32"),
        optimizer=OptimizerConfig(lr=3e-2),
        train=run.train.replace(train_iters=2),
        checkpoint=CheckpointConfig(save_to=str(root / "save")),
    )
    train(run, process_groups.start(run.parallel))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    infimm_folder(GOLDEN, root / "hf")
    chat = ChatConfig(template="zephyr")
    prepare_toys(root / "data", root / "hf", chat, {"pairs": 8}, ToyWorld(sizes=((64, 64),)))
    spawn(train_two_steps, 2, root)
    return root


def run_commands(commands: list[list[str]]) -> list[Outcome]:
    """(exit code, standard output, standard error) of each command, one after another, on one rank."""
    outcomes = []
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command)
        outcomes.append((code, out.getvalue(), err.getvalue()))
    return outcomes


def test_a_checkpoint_says_what_its_export_says(root: Path, tmp_path: Path) -> None:
    question = ["--prompt", "what is this?", "--chat", "--json", "--max-new-tokens", "8"]
    out = str(tmp_path / "out")
    commands = [
        ["export-hf", "--load", str(root / "save"), "--out", out],
        ["generate", "--hf", out, *question],
        ["generate", "--load", str(root / "save"), *question],
        ["generate", "--load", str(checkpoint_path(root / "save", 2)), "--tokenizer", out, *question],
        ["generate", "--hf", str(root / "hf"), *question],
    ]
    outcomes = spawn(run_commands, 1, commands)[0]
    assert [(code, err) for code, _, err in outcomes] == [(0, "")] * len(commands)
    _, folder, save, checkpoint, before = (out for _, out, _ in outcomes)
    assert folder == save == checkpoint
    asked = ("prompt_token_ids", "token_ids")
    assert json.loads(before)[asked[1]] != json.loads(save)[asked[1]], "training changed what is said"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def record_case(folder: Path, file: Path) -> None:
    """What transformers computes with the folder's code."""
    inputs = {name: load_file(GOLDEN / "cases.safetensors")[f"one_image.{name}"] for name in ("input_ids", "images")}
    with offline(file.parent / "modules"), torch.no_grad():
        logits = load(folder, dtype=torch.float32).eval()(**inputs).logits
    save_file({f"case.{name}": tensor for name, tensor in {**inputs, "logits": logits}.items()}, file)


def test_a_checkpoint_is_proven_on_what_transformers_computes_from_its_export(root: Path, tmp_path: Path) -> None:
    """And the folder that it started from is off by more."""
    save, out, cases = str(root / "save"), tmp_path / "out", tmp_path / "cases.safetensors"
    (exported,) = spawn(run_commands, 1, [["export-hf", "--load", save, "--out", str(out)]])[0]
    assert exported[0] == 0, exported
    record_case(out, cases)
    verify = ["verify-hf", "--cases", str(cases), "--json"]
    commands = [
        [*verify, "--load", save],
        [*verify, "--load", str(checkpoint_path(root / "save", 2))],
        [*verify, "--hf", str(root / "hf")],
    ]
    whole, one, before = spawn(run_commands, 1, commands)[0]
    assert (whole[0], one[0], before[0]) == (0, 0, 1), (whole, one, before)
    assert whole[1].splitlines()[-1] == one[1].splitlines()[-1]


def test_mistakes_end_in_one_line(root: Path, tmp_path: Path) -> None:
    save, hf = str(root / "save"), str(root / "hf")
    (tmp_path / "iter_0000001").mkdir()
    expected: list[tuple[list[str], str]] = [
        (["generate", "--load", "/none", "--prompt", "a"], "--load = '/none': there is no such folder"),
        (["generate", "--load", str(tmp_path), "--prompt", "a"], "holds no run.json"),
        (["generate", "--load", save, "--hf", hf, "--prompt", "a"], "one model is asked"),
        (["generate", "--load", save, "--tokenizer", "/none", "--prompt", "a"], "tokenizer of"),
        (["export-hf", "--load", save, "--hf", hf, "--out", str(tmp_path / "x")], "one of which is needed"),
        (["verify-hf", "--load", save, "--against", "transformers"], "use --cases"),
        (["train", "decoder-tiny", "--load-hf", hf, "--pretrained-checkpoint", save], "weights come from one place"),
    ]
    outcomes = spawn(run_commands, 1, [command for command, _ in expected])[0]
    for (code, out, err), (command, words) in zip(outcomes, expected, strict=True):
        assert code == 2, (command, out)
        assert err.startswith("megavlm: error: ") and err.count("\n") == 1, err
        assert words in err, err
