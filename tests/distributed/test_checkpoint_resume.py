"""A run that is saved and gone on with: the same bits in the same layout, the same losses in any other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import every_layout
from resumed_runs import (
    DISTRIBUTED,
    FAMILIES,
    INTERLEAVED,
    OVERLAPPED,
    PLAIN,
    PP2,
    TP2,
    TP2_SP,
    aquila_folder,
    assert_same_bits,
    assert_same_tensors,
    fingerprint,
    run_of,
    saved_tensors,
    start,
)

from megavlm.build.run_config import DataParallelConfig, RunConfig
from megavlm.checkpoint.manager import CheckpointManager
from megavlm.checkpoint.shelf import checkpoint_path
from megavlm.parallel import groups as process_groups
from megavlm.testing import assert_losses_close, spawn


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aquila_folder(tmp_path_factory.mktemp("aquila") / "model")


SAME_LAYOUT: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "dropout, overlapped gather": ("decoder", 2, {}, {"data_parallel": OVERLAPPED, "dropout": 0.1}),
    "bf16 with masters, DP=2": ("decoder", 2, {}, {"dtype": "bfloat16"}),
    "bf16 with masters, TP=2": ("decoder", 2, TP2_SP, {"dtype": "bfloat16", "data_parallel": PLAIN}),
    "InfiMM interleaved": ("infimm", 2, INTERLEAVED, {}),
    "a stage without trainables": ("aquila_vl, stage 1", 2, PP2, {}),
    "the same, plain optimizer": ("aquila_vl, stage 1", 2, PP2, {"data_parallel": PLAIN}),
    "Aquila-VL with its tower": ("aquila_vl", 2, TP2_SP, {"dropout": 0.1}),
}


def go_on_in_same_layout(cases: dict[str, RunConfig], folder: Path) -> None:
    process_groups.join()
    for name, run in cases.items():
        live, path = start(run), folder / name
        live.steps(0, 2)
        CheckpointManager(path).save(live.state, 2)
        expected, then = live.steps(2, 4), fingerprint(live)
        again = start(run)
        torch.rand(3)
        assert CheckpointManager(path).load_latest(again.state) == 2
        assert again.steps(2, 4) == expected, name
        assert_same_bits(fingerprint(again), then)


def test_the_same_layout_goes_on_bit_by_bit(weights: Path, tmp_path: Path) -> None:
    runs = {name: run_of(family, weights, degrees, **more) for name, (family, _, degrees, more) in SAME_LAYOUT.items()}
    spawn(go_on_in_same_layout, 2, runs, tmp_path)


Hop = tuple[int, dict[str, Any], DataParallelConfig]
HOPS: list[Hop] = [
    (2, TP2_SP, DISTRIBUTED),
    (2, PP2, PLAIN),
    (2, INTERLEAVED, DISTRIBUTED),
    (1, {}, DISTRIBUTED),
    (2, {}, OVERLAPPED),
    (4, {**TP2, **PP2}, PLAIN),
    (2, {}, DISTRIBUTED),
]
"""Each goes on from what the one before it saved: processes, degrees, optimizer."""
HOPS_OF: dict[str, list[Hop]] = {"decoder": HOPS, "infimm": HOPS[::2], "aquila_vl": HOPS[2:6]}


def uninterrupted(run: RunConfig, steps: int) -> list[float]:
    process_groups.join()
    return start(run).steps(0, steps)


def hop(runs: list[RunConfig], folder: Path, first: int) -> list[float]:
    """One step under each run, every one of which loads what was saved last, and first saves it again unchanged."""
    process_groups.join()
    losses = []
    for step, run in enumerate(runs, start=first):
        live, manager = start(run), CheckpointManager(folder)
        found = manager.load_latest(live.state)
        assert found == (step or None)
        if step:
            CheckpointManager(folder / "again").save(live.state, step)
            loaded = saved_tensors(checkpoint_path(folder, step))
            assert_same_tensors(saved_tensors(checkpoint_path(folder / "again", step)), loaded)
        losses.append(live.step(step))
        manager.save(live.state, step + 1)
    return losses


def losses_over_hops(family: str, weights: Path, folder: Path, hops: list[Hop]) -> list[float]:
    losses: list[float] = []
    for processes, some in itertools.groupby(hops, key=lambda one: one[0]):
        runs = [run_of(family, weights, degrees, data_parallel) for _, degrees, data_parallel in some]
        per_rank = spawn(hop, processes, runs, folder, len(losses), timeout=300)
        losses += [max(of_step) for of_step in zip(*per_rank, strict=True)]
    return losses


@pytest.mark.parametrize("family", HOPS_OF)
def test_any_layout_goes_on_from_any_other(family: str, weights: Path, tmp_path: Path) -> None:
    hops = HOPS_OF[family]
    (expected,) = spawn(uninterrupted, 1, run_of(family, weights, {}), len(hops))
    assert len({f"{loss:.4f}" for loss in expected}) == len(expected)
    for mine, theirs in zip(losses_over_hops(family, weights, tmp_path, hops), expected, strict=True):
        assert_losses_close(mine, theirs)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_all_layouts_go_on_from_another(family: str, weights: Path, tmp_path: Path) -> None:
    hops: list[Hop] = [
        (processes, degrees, (DISTRIBUTED, PLAIN)[number % 2])
        for number, (_, processes, degrees) in enumerate(every_layout())
    ]
    (expected,) = spawn(uninterrupted, 1, run_of(family, weights, {}), len(hops))
    for mine, theirs in zip(losses_over_hops(family, weights, tmp_path, hops), expected, strict=True):
        assert_losses_close(mine, theirs)


def reshape_masters(runs: list[RunConfig], folder: Path) -> None:
    process_groups.join()
    live = start(runs[0])
    live.steps(0, 2)
    CheckpointManager(folder).save(live.state, 2)
    expected = saved_tensors(checkpoint_path(folder, 2))
    assert {name.split(".")[1] for name in expected if name.startswith("optimizer.")} == {
        "exp_avg",
        "exp_avg_sq",
        "master",
    }
    for number, run in enumerate(runs[1:]):
        other = start(run)
        CheckpointManager(folder).load_latest(other.state)
        CheckpointManager(folder / str(number)).save(other.state, 2)
        assert_same_tensors(saved_tensors(checkpoint_path(folder / str(number), 2)), expected)


def test_masters_of_bf16_keep_their_bits_in_other_layouts(weights: Path, tmp_path: Path) -> None:
    layouts = [({}, DISTRIBUTED), (TP2, PLAIN), (PP2, DISTRIBUTED), ({}, PLAIN)]
    runs = [run_of("decoder", weights, degrees, optimizer, "bfloat16") for degrees, optimizer in layouts]
    spawn(reshape_masters, 2, runs, tmp_path)


def save_in_background(run: RunConfig, folder: Path) -> None:
    process_groups.join()
    live = start(run)
    live.steps(0, 2)
    CheckpointManager(folder / "sync").save(live.state, 2)
    manager = CheckpointManager(folder / "async", async_save=True)
    manager.save(live.state, 2)
    assert manager.last_saved is None
    live.steps(2, 5)
    manager.poll(live.state)
    manager.save(live.state, 5)  # waits for the one before
    assert manager.last_saved == 2
    manager.finish(live.state)
    assert manager.last_saved == 5
    expected = saved_tensors(checkpoint_path(folder / "sync", 2))
    assert_same_tensors(saved_tensors(checkpoint_path(folder / "async", 2)), expected)
    again = start(run)
    assert CheckpointManager(folder / "async").load_latest(again.state) == 5
    assert_same_bits(fingerprint(again), fingerprint(live))


def test_a_save_in_the_background_holds_the_state_of_its_step(weights: Path, tmp_path: Path) -> None:
    spawn(save_in_background, 2, run_of("infimm", weights, {}), tmp_path)
