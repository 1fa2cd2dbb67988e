"""The scales of FP8 in checkpoints: the same bits in the same layout, anew in another, and the run says so."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fp8_layers import DelayedScaling, ScaledLayer, give_scales, scales_of
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from resumed_runs import (
    INTERLEAVED,
    PP2,
    TP2,
    TP2_SP,
    Live,
    aquila_folder,
    assert_same_bits,
    fingerprint,
    row_of,
    run_of,
    saved_tensors,
    start,
)

from megavlm.build.run_config import RunConfig
from megavlm.checkpoint import fp8_scales, sharded
from megavlm.checkpoint.manager import CheckpointManager
from megavlm.checkpoint.shelf import checkpoint_path
from megavlm.errors import CheckpointError
from megavlm.export.hf_export import export_model
from megavlm.parallel import groups as process_groups
from megavlm.parallel.recompute import RecomputeConfig
from megavlm.parallel.schedule import forward_loss
from megavlm.testing import spawn
from megavlm.train.evaluation import evaluating

ANEW = "the scales of FP8 start anew"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aquila_folder(tmp_path_factory.mktemp("aquila") / "model")


def start_fp8(run: RunConfig, **settings: Any) -> Live:
    """With layers that keep scales; the settings are said to the wrapper alone, for its layers have no real FP8."""
    live = start(run)
    give_scales(live.state.parts)
    for chunk in live.chunks:
        chunk.config = copy.copy(chunk.config)
        for name, value in {"fp8": "hybrid", "fp8_recipe": "delayed", **settings}.items():
            setattr(chunk.config, name, value)
    return live


class Lines(logging.Handler):
    """What is logged on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def resume(live: Live, folder: Path) -> list[str]:
    """Load the latest checkpoint; what was said of scales."""
    heard = Lines()
    fp8_scales.logger.addHandler(heard)
    fp8_scales.logger.setLevel(logging.INFO)
    try:
        with mock.patch.object(fp8_scales, "get_fp8_recipe", return_value=DelayedScaling()):
            assert CheckpointManager(folder).load_latest(live.state) == 2
    finally:
        fp8_scales.logger.removeHandler(heard)
    return [line.removeprefix(f"{ANEW}: ") for line in heard.lines]


def trained(run: RunConfig, folder: Path) -> Live:
    live = start_fp8(run)
    live.steps(0, 2)
    CheckpointManager(folder).save(live.state, 2)
    return live


def go_on(runs: dict[str, RunConfig], folder: Path) -> None:
    process_groups.join()
    for name, run in runs.items():
        live = trained(run, folder / name)
        kept = scales_of(live.state.parts)
        assert all(kept.values()), "a layer has no scales"
        expected, then = live.steps(2, 4), fingerprint(live)
        scales_then = scales_of(live.state.parts)
        assert kept != scales_then
        again = start_fp8(run)
        assert not any(scales_of(again.state.parts).values())
        assert resume(again, folder / name) == []
        assert scales_of(again.state.parts) == kept, name
        assert again.steps(2, 4) == expected, name
        assert_same_bits(fingerprint(again), then)
        assert scales_of(again.state.parts) == scales_then, name
        # Scales matter here: without them the losses are others.
        without = start_fp8(run)
        with mock.patch.object(sharded, "restore_scales"):
            resume(without, folder / name)
        assert without.steps(2, 4) != expected or not any(expected), name


def test_the_same_layout_goes_on_with_the_same_scales(weights: Path, tmp_path: Path) -> None:
    recompute = RecomputeConfig(granularity="full")
    runs = {
        "DP=2": run_of("decoder", weights, {}),
        "TP=2": run_of("infimm", weights, TP2_SP),
        "PP=2, recomputed": run_of("decoder", weights, PP2).replace(recompute=recompute),
        "interleaved": run_of("infimm, all", weights, INTERLEAVED),
    }
    spawn(go_on, 2, runs, tmp_path, timeout=300)


def start_anew(saved: RunConfig, others: list[RunConfig], folder: Path) -> list[list[str]]:
    process_groups.join()
    trained(saved, folder)
    said = []
    for run in others:
        live = start_fp8(run)
        said.append(resume(live, folder))
        assert not any(scales_of(live.state.parts).values())
        live.step(2)
    return said


def test_another_layout_starts_anew_and_says_so(weights: Path, tmp_path: Path) -> None:
    runs = [run_of("decoder", weights, degrees) for degrees in (PP2, TP2, {}, INTERLEAVED)]
    for said in spawn(start_anew, 2, runs[0], runs[1:], tmp_path):
        assert said == [["the checkpoint is of another layout"]] * 3


def meet_others(run: RunConfig, folder: Path) -> None:
    process_groups.join()
    plain = start(run)
    plain.steps(0, 2)
    CheckpointManager(folder / "bf16").save(plain.state, 2)
    assert not any(name.startswith("fp8") for name in saved_tensors(checkpoint_path(folder / "bf16", 2)))
    assert resume(start_fp8(run), folder / "bf16") == ["the checkpoint holds none"]
    trained(run, folder / "fp8")
    assert resume(start(run), folder / "fp8") == []
    assert resume(start_fp8(run, fp8_recipe="tensorwise"), folder / "fp8") == []
    said = resume(start_fp8(run, fp8="e4m3"), folder / "fp8")
    assert said == ["the checkpoint is of other settings of FP8"]


def test_runs_of_other_number_formats_take_each_others_checkpoints(weights: Path, tmp_path: Path) -> None:
    spawn(meet_others, 1, run_of("decoder", weights, {}), tmp_path)


class Bomb:
    """What runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def save_bomb(run: RunConfig, folder: Path) -> str:
    process_groups.join()
    live = start_fp8(run)
    live.steps(0, 2)
    torch.save({"settings": {}, "layers": {"bomb": Bomb(folder / "exploded")}}, folder / "bomb.pt")
    content = torch.frombuffer(bytearray((folder / "bomb.pt").read_bytes()), dtype=torch.uint8)
    bomb = ShardedTensor.from_rank_offsets(fp8_scales.scales_key(0), content)
    with mock.patch.object(sharded, "_scales_to_save", return_value=[bomb]):
        CheckpointManager(folder).save(live.state, 2)
    again = start_fp8(run)
    before = fingerprint(again)
    with pytest.raises(CheckpointError) as refused:
        resume(again, folder)
    assert_same_bits(fingerprint(again), before)
    return str(refused.value)


def test_scales_that_call_for_code_are_refused(weights: Path, tmp_path: Path) -> None:
    (line,) = spawn(save_bomb, 1, run_of("decoder", weights, {}), tmp_path)
    assert "fp8_scales.0" in line
    assert "getattr" in line
    assert "\n" not in line
    assert not (tmp_path / "exploded").exists()


def evaluate_and_export(run: RunConfig, folder: Path) -> None:
    process_groups.join()
    live = start_fp8(run)
    live.steps(0, 2)
    kept = scales_of(live.state.parts)
    with evaluating(live.chunks):
        forward_loss(live.chunks, [row_of(run, 7)], live.groups, live.model.inputs)
        during = scales_of(live.state.parts)
    assert during != kept
    assert scales_of(live.state.parts) == kept
    export_model(live.model, run, live.groups, folder / "with scales")
    for part in live.state.parts:
        for module in part.modules():
            if isinstance(module, ScaledLayer):
                module.fp8_meta = {}
    export_model(live.model, run, live.groups, folder / "without")


def test_evaluation_and_export_leave_scales_alone(weights: Path, tmp_path: Path) -> None:
    spawn(evaluate_and_export, 2, run_of("infimm", weights, TP2), tmp_path)
    sums = [(tmp_path / name / "SHA256SUMS").read_text() for name in ("with scales", "without")]
    assert sums[0] == sums[1]
