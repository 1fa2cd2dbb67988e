"""What FP8 asks of a run, what is refused of it, and what its layers' extra state is read as."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from fp8_layers import DelayedScaling
from megatron.core import fp8_utils

from megavlm.build.from_checkpoint import run_from_checkpoint
from megavlm.build.run_config import ParallelConfig, RunConfig, check_for_world
from megavlm.checkpoint import shelf
from megavlm.checkpoint.restricted_pickle import extra_state_bytes, extra_state_values
from megavlm.errors import CheckpointError, LayoutError, UnavailableError
from megavlm.model.precision import PrecisionConfig, check_fp8, forget_fp8_layers
from megavlm.parallel.recompute import RecomputeConfig, check_recompute
from megavlm.recipes import recipe

FP8 = PrecisionConfig(fp8_format="hybrid")
LAYERNORM = RecomputeConfig(granularity="selective", modules=("layernorm",))


def refused(error: type[Exception], call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(error) as found:
        call(*arguments)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_layernorm_is_not_recomputed_under_delayed_scales() -> None:
    line = refused(UnavailableError, check_recompute, LAYERNORM, FP8, True, True)
    assert "--recompute-modules" in line
    assert "--fp8-recipe" in line
    check_recompute(LAYERNORM, FP8.replace(fp8_recipe="tensorwise"), True, True)
    check_recompute(LAYERNORM, PrecisionConfig(), True, True)
    check_recompute(LAYERNORM.replace(modules=("mlp",)), FP8, True, True)


def run_with_rows(tokens: int, precision: PrecisionConfig, **degrees: Any) -> RunConfig:
    run = recipe("decoder-tiny-qwen2")
    rows = run.train.replace(seq_length=tokens, micro_batch_size=1, global_batch_size=8)
    return run.replace(train=rows, precision=precision, parallel=ParallelConfig(**degrees))


def test_rows_are_as_long_as_fp8_takes_them() -> None:
    line = refused(LayoutError, check_for_world, run_with_rows(24, FP8), 1)
    assert "train.seq_length" in line
    assert "use 32" in line
    check_for_world(run_with_rows(32, FP8), 1)
    check_for_world(run_with_rows(24, PrecisionConfig()), 1)
    slices = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    check_for_world(run_with_rows(16, FP8, **slices), 2)
    refused(LayoutError, check_for_world, run_with_rows(24, FP8, **slices), 2)
    refused(LayoutError, check_for_world, run_with_rows(32, FP8.replace(fp8_recipe="mxfp8"), **slices), 2)
    check_for_world(run_with_rows(64, FP8.replace(fp8_recipe="mxfp8"), **slices), 2)


def test_consumer_blackwell_has_no_micro_scaled_products() -> None:
    mxfp8 = FP8.replace(fp8_recipe="mxfp8")
    line = refused(UnavailableError, check_fp8, mxfp8, "a chip", (12, 0), True)
    assert "10.0 and less than 12.0" in line
    check_fp8(mxfp8, "a chip", (10, 3), True)
    check_fp8(FP8, "a chip", (12, 0), True)


@pytest.mark.parametrize("fp8_format", ["none", "hybrid"])
def test_a_checkpoint_of_fp8_is_asked_and_exported_without(
    fp8_format: Literal["none", "hybrid"], tmp_path: Path
) -> None:
    run = recipe("decoder-tiny-qwen2").replace(precision=PrecisionConfig(fp8_format=fp8_format))
    fields = {"format": shelf.FORMAT, "step": 1, "optimizer_steps": 1, "scheduler_steps": 1}
    folder = shelf.checkpoint_path(tmp_path, 1)
    folder.mkdir()
    record = {**fields, "layout": {}, "identity": {}, "frozen": None, "run": run.to_dict()}
    (folder / shelf.RUN_FILE).write_bytes(shelf.run_bytes(record))
    found, _ = run_from_checkpoint(tmp_path)
    assert found.precision == run.precision.replace(fp8_format="none")


def test_layers_of_a_model_that_is_gone_are_forgotten_where_there_are_any() -> None:
    forget_fp8_layers()  # nothing is installed that knows of layers
    manager = mock.Mock()
    with (
        mock.patch.object(fp8_utils, "HAVE_TE", True),
        mock.patch.object(fp8_utils, "FP8GlobalStateManager", manager, create=True),
    ):
        forget_fp8_layers()
    manager.reset.assert_called_once_with()


def extra_state() -> dict[str, Any]:
    variables = {"num_gemms": 1, "fp8_checkpoint": True, "names": ["a", ("b", 2.0)]}
    tensors = {"scale_fwd": torch.rand(3), "amax_history_fwd": torch.rand(4, 3)}
    return {"recipe": DelayedScaling(), **tensors, "extra_fp8_variables": variables}


def test_extra_state_is_read_as_tensors_and_plain_values() -> None:
    state = extra_state()
    state["extra_fp8_variables"]["local_recipes"] = [DelayedScaling()]
    values = extra_state_values(pickle.dumps(state), "a layer")
    assert list(values) == ["scale_fwd", "amax_history_fwd", "extra_fp8_variables"]
    assert torch.equal(values["amax_history_fwd"], state["amax_history_fwd"])
    assert values["extra_fp8_variables"] == extra_state()["extra_fp8_variables"]
    again = pickle.loads(extra_state_bytes(values, DelayedScaling(margin=2)))
    assert list(again) == list(state)
    assert again["recipe"] == DelayedScaling(margin=2)


def test_extra_state_of_operations_has_a_recipe_for_each_direction() -> None:
    values = extra_state_values(pickle.dumps({"forward": extra_state()}), "a layer")
    assert list(values["forward"]) == ["scale_fwd", "amax_history_fwd", "extra_fp8_variables"]
    assert pickle.loads(extra_state_bytes(values, DelayedScaling()))["forward"]["recipe"] == DelayedScaling()


class Harmful:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_reading_extra_state_runs_nothing_and_refuses_another_format(tmp_path: Path) -> None:
    harmful = {"extra_fp8_variables": {"a": Harmful(tmp_path / "made")}}
    assert extra_state_values(pickle.dumps(harmful), "a layer") == {"extra_fp8_variables": {}}
    assert not (tmp_path / "made").exists()
    for content in (b"no pickle", pickle.dumps([1])):
        assert "a layer" in refused(CheckpointError, extra_state_values, content, "a layer")
