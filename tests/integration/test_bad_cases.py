"""A file of cases that proves nothing, or belongs to another model, is refused by `verify-hf` in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megavlm.cli import main

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"
STEP = "training_step."


def keep(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {STEP + name: tensors[STEP + name] for name in names}


def cut_logits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = keep("input_ids", "images", "logits")(tensors)
    return {**kept, STEP + "logits": kept[STEP + "logits"][..., :-1].contiguous()}


def name_a_foreign_gradient(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**keep("input_ids", "images", "labels", "loss")(tensors), STEP + "grad.no.such.tensor": torch.ones(3)}


def leave_out_the_loss(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(STEP) and name != STEP + "loss"}


def use_a_foreign_token(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = keep("input_ids", "images", "logits")(tensors)
    kept[STEP + "input_ids"][0, 0] = 128
    return kept


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda tensors: {}, ["holds no case", "NAME.input_ids"]),
        (keep("input_ids", "images"), ["training_step", "neither logits nor a loss", "add one"]),
        (cut_logits, ["training_step.logits = (2, 28, 127)", "(2, 28, 128)"]),
        (name_a_foreign_gradient, ["grad.no.such.tensor = (3,)", "no such tensor"]),
        (leave_out_the_loss, ["training_step.loss", "is missing beside the gradients"]),
        (use_a_foreign_token, ["training_step.input_ids = 128", "vocabulary of 128"]),
    ],
)
def test_cases_that_prove_nothing(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    expected: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "cases.safetensors"
    save_file(change(load_file(GOLDEN / "cases.safetensors")), file)
    assert main(["verify-hf", "--hf", str(GOLDEN), "--cases", str(file)]) == 2
    line = capfd.readouterr().err
    assert all(part in line for part in expected), line


def test_missing_file_of_cases(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-hf", "--hf", str(GOLDEN), "--cases", "/nowhere/cases"]) == 2
    assert "--cases = '/nowhere/cases': there is no such file" in capfd.readouterr().err


def test_loss_alone_is_a_case(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cases.safetensors"
    save_file(keep("input_ids", "images", "labels", "loss")(load_file(GOLDEN / "cases.safetensors")), file)
    assert main(["verify-hf", "--hf", str(GOLDEN), "--cases", str(file)]) == 0
    assert "loss" in capfd.readouterr().out
