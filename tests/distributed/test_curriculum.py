"""Several stages as one run: handed over, skipped, gone on with, whatever moment it was killed at."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from prepared_toys import data_config, prepare_toys, stream
from resumed_runs import PP2, TP2, assert_same_tensors, saved_tensors, start
from tiny_folders import infimm_folder

import megavlm.curriculum.run as curriculum
from megavlm.build.from_folder import run_from_folder
from megavlm.build.run_config import (
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    WeightsConfig,
)
from megavlm.checkpoint.shelf import checkpoint_path, steps_saved
from megavlm.curriculum.run import train_stages
from megavlm.curriculum.stages import place_stages, table
from megavlm.data.chat import ChatConfig
from megavlm.data.ledger import check_ledger, order_of_ledger
from megavlm.data.toy_world.world import ToyWorld
from megavlm.errors import CheckpointError, ConfigError
from megavlm.parallel import groups as process_groups
from megavlm.testing import RankFailed, assert_losses_close, spawn

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"
STAGES: dict[str, tuple[str, ...]] = {
    "pretrain": ("cross_attention", "resampler", "new_tokens"),
    "multitask": ("cross_attention", "resampler"),
    "finetune": ("cross_attention", "resampler", "decoder"),
}
STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    infimm_folder(GOLDEN, root / "hf")
    chat = ChatConfig(template="zephyr")
    prepare_toys(root / "data", root / "hf", chat, {"chat": 16}, ToyWorld(sizes=((64, 64),)))
    return root


def runs_of(world: Path, save: Path, degrees: Sequence[dict[str, Any]] = (TP2,) * 3, **weights: Any) -> Any:
    """A run for each stage, as the command line leaves them."""
    data = data_config(world / "data", world / "hf", ChatConfig(template="zephyr"), [stream(["chat"], 4)])
    run = run_from_folder(world / "hf").replace(
        data=data.replace(tokenizer=None),
        precision=PrecisionConfig(params_dtype="float32"),
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_iters=1),
        weights=WeightsConfig(**{"load_hf": str(world / "hf"), **weights}),
        checkpoint=CheckpointConfig(save_to=str(save), save_interval=1),
        make_vocab_size_divisible_by=2,
    )
    run = run.replace(train=run.train.replace(train_iters=STEPS))
    return {
        name: run.replace(name=name, trainable=trainable, parallel=ParallelConfig(**of_stage))
        for (name, trainable), of_stage in zip(STAGES.items(), degrees, strict=True)
    }


def train_all(runs: dict[str, RunConfig], chosen: Sequence[str], moment: tuple[Path, int, float] | None = None) -> Any:
    """The whole command; rank 1 is killed so many seconds behind the sight of so many checkpoints, done or begun."""
    world_size = process_groups.join()
    if moment is not None and os.environ["RANK"] == "1":
        threading.Thread(target=kill_at, args=moment, daemon=True).start()
    stages = place_stages(runs, chosen, world_size)
    return table(stages), train_stages(stages)


def checkpoints(save: Path) -> int:
    return sum(1 for _ in save.glob("*/*iter_*"))


def kill_at(save: Path, seen: int, delay: float) -> None:
    while checkpoints(save) < seen:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """One that was never killed."""
    spawn(train_all, 2, runs_of(world, world / "whole", export_hf=str(world / "exports")), list(STAGES))
    return world / "whole"


def compare(one: Path, other: Path, run: RunConfig) -> None:
    process_groups.join()
    start(run)
    for stage in STAGES:
        mine, theirs = (checkpoint_path(save / stage, STEPS) for save in (one, other))
        assert_same_tensors(saved_tensors(mine), saved_tensors(theirs))
        report = check_ledger(one / stage / "ledger", order_of_ledger(one / stage / "ledger"))
        assert (report.steps, report.wrong) == (STEPS, [])


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.full)])
def test_a_curriculum_killed_at_any_moment_ends_the_same(kills: int, world: Path, whole: Path, tmp_path: Path) -> None:
    draw = random.Random(kills)
    runs = runs_of(world, tmp_path, export_hf=str(tmp_path / "exports"))
    for number in range(kills):
        seen = max(checkpoints(tmp_path), 3 * STEPS * number // kills) + draw.choice([0, 1])
        if seen >= 3 * STEPS:
            break
        with pytest.raises(RankFailed, match="exit code -9"):
            moment = (tmp_path, max(seen, 1), draw.uniform(0.0, 0.2))
            spawn(train_all, 2, runs, list(STAGES), moment, timeout=600)
    (lines, stopped), _ = spawn(train_all, 2, runs, list(STAGES), timeout=600)
    assert stopped is None and lines[0].split() == ["stage", "steps", "state", "starts", "from"]
    spawn(compare, 1, tmp_path, whole, runs_of(world, tmp_path, ({},) * 3)["pretrain"])
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == sorted(STAGES)
    for export in (tmp_path / "exports").iterdir():
        for file in ("model.safetensors", "tokenizer.json"):
            assert (export / file).read_bytes() == (world / "exports" / export.name / file).read_bytes()


def loss_behind(run: RunConfig, save: Path) -> float:
    process_groups.join()
    return start(run.replace(weights=WeightsConfig(pretrained_checkpoint=str(save / "finetune")))).step(0)


def test_each_stage_may_have_another_layout(world: Path, whole: Path, tmp_path: Path) -> None:
    spawn(train_all, 2, runs_of(world, tmp_path, (PP2, {}, TP2)), list(STAGES))
    run = runs_of(world, tmp_path, ({},) * 3)["finetune"]
    (mine,), (theirs,) = spawn(loss_behind, 1, run, tmp_path), spawn(loss_behind, 1, run, whole)
    assert_losses_close(mine, theirs)


def train_and_watch(runs: dict[str, RunConfig]) -> list[bool]:
    """Whether the model of the stage before was still held when a stage began."""
    process_groups.join()
    models: list[Any] = []
    held: list[bool] = []
    plain = curriculum.train

    def watching(*arguments: Any) -> Any:
        held.extend(model() is not None for model in models)
        outcome = plain(*arguments)
        models.extend(weakref.ref(chunk) for chunk in outcome.model.chunks)
        return outcome

    curriculum.train = watching  # type: ignore[assignment]
    train_stages(place_stages(runs, list(STAGES), 1))
    return held


def test_a_finished_stage_leaves_nothing_in_memory(world: Path, tmp_path: Path) -> None:
    assert spawn(train_and_watch, 1, runs_of(world, tmp_path, ({},) * 3))[0] == [False, False, False]


def placed(runs: dict[str, RunConfig], chosen: Sequence[str] = tuple(STAGES)) -> list[tuple[str, str]]:
    return [(stage.state, stage.origin) for stage in place_stages(runs, chosen, 2)]


def test_what_is_on_disk_decides(world: Path, whole: Path, tmp_path: Path) -> None:
    hf = str(world / "hf")
    shutil.copytree(whole, tmp_path / "save")
    runs = runs_of(world, tmp_path / "save")
    assert placed(runs) == [("done", hf), ("done", "pretrain, step 3"), ("done", "multitask, step 3")]
    exported = runs_of(world, tmp_path / "save", export_hf=str(world / "exports"))
    assert [state for state, _ in placed(exported)] == ["done"] * 3
    exported = runs_of(world, tmp_path / "save", export_hf=str(tmp_path / "exports"))
    assert [state for state, _ in placed(exported)] == ["to export"] * 3

    longer = {**runs, "finetune": runs["finetune"].replace(train=runs["finetune"].train.replace(train_iters=9))}
    assert placed(longer)[2] == ("at step 3", "multitask, step 3")
    shutil.rmtree(tmp_path / "save" / "finetune")
    assert placed(runs)[2] == ("to do", "multitask, step 3")
    assert placed(runs, ["finetune"]) == [("to do", "multitask, step 3")]
    shutil.rmtree(tmp_path / "save" / "multitask")
    assert placed(runs, ["finetune"]) == [("to do", hf)], "no stage before it was begun: the user's weights"
    shutil.rmtree(tmp_path / "save" / "pretrain")
    assert placed(runs)[0] == ("to do", hf)


def test_what_is_damaged_is_passed_over_where_that_is_asked(world: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "save")
    runs = runs_of(world, tmp_path / "save")
    tolerant = {
        name: run.replace(checkpoint=run.checkpoint.replace(load_previous_if_damaged=True))
        for name, run in runs.items()
    }
    shutil.rmtree(tmp_path / "save" / "finetune" / "iter_0000003")  # the pointer says 3
    with pytest.raises(CheckpointError, match="there is no iter_0000003.*or use --load-previous-if-damaged"):
        placed(runs)
    assert placed(tolerant)[2] == ("at step 2", "multitask, step 3")
    (tmp_path / "save" / "finetune" / "iter_0000002" / "run.json").unlink()
    assert placed(tolerant)[2] == ("at step 2", "multitask, step 3")
    (tmp_path / "save" / "finetune" / "iter_0000001" / "run.json").write_text("{")
    assert placed(tolerant)[2] == ("at step 2", "multitask, step 3")


def test_mistakes_are_refused_before_anything_is_trained(world: Path, whole: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    shutil.copytree(whole, save)
    runs = runs_of(world, save)

    def refusal(changed: dict[str, Any], chosen: Sequence[str] = tuple(STAGES), kind: Any = ConfigError) -> str:
        with pytest.raises(kind) as error:
            place_stages(changed, chosen, 2)
        assert "\n" not in str(error.value)
        return str(error.value)

    def with_all(**changes: Any) -> dict[str, Any]:
        return {name: run.replace(**changes) for name, run in runs.items()}

    assert "pretrain: --save" in refusal(with_all(checkpoint=CheckpointConfig()))
    assert "--load" in refusal(with_all(checkpoint=CheckpointConfig(save_to="x", load_from="y")))
    wide = runs["multitask"].decoder.replace(norm_epsilon=1e-3)
    other = {**runs, "multitask": runs["multitask"].replace(decoder=wide)}
    assert "multitask: decoder.norm_epsilon" in refusal(other)
    # A stage that was finished on weights that its predecessor has gone beyond.
    longer = runs["pretrain"].replace(train=runs["pretrain"].train.replace(train_iters=5))
    message = refusal({**runs, "pretrain": longer}, kind=CheckpointError)
    assert message.startswith("multitask: ") and "iter_0000005" in message and "move" in message
    shutil.rmtree(save / "multitask")
    (tmp_path / "exports" / "multitask").mkdir(parents=True)
    exporting = runs_of(world, save, export_hf=str(tmp_path / "exports"))
    assert "multitask: --export-hf" in refusal(exporting)
    shutil.rmtree(save / "finetune")
    bare = runs_of(world, save, load_hf=None)
    bare = {name: run.replace(data=run.data.replace(tokenizer=str(world / "hf"))) for name, run in bare.items()}
    assert "leaves out multitask, which has not been trained" in refusal(bare, ["finetune"])
    (checkpoint_path(save / "pretrain", STEPS) / "run.json").unlink()
    assert "pretrain" in refusal(runs, kind=CheckpointError)
    tolerant = {
        name: run.replace(checkpoint=run.checkpoint.replace(load_previous_if_damaged=True))
        for name, run in runs.items()
    }
    assert placed(tolerant)[0][0] == f"at step {steps_saved(save / 'pretrain')[-2]}"
