"""Starting from the weights of a checkpoint: all of them, whatever was trained there and under whatever layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import INTERLEAVED, PP2, TP2, TP2_SP, aquila_folder, run_of, start
from torch import Tensor

from megavlm.build.families import state_map_of
from megavlm.build.model import build_model
from megavlm.build.run_config import RunConfig, WeightsConfig
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_tensors import folder_tensors
from megavlm.checkpoint.manager import CheckpointManager
from megavlm.checkpoint.optimizer_state import steps_taken
from megavlm.checkpoint.shelf import checkpoint_path
from megavlm.export.hf_export import export_model
from megavlm.parallel import groups as process_groups
from megavlm.testing import RankFailed, spawn


@pytest.fixture(scope="module")
def aquila(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aquila_folder(tmp_path_factory.mktemp("aquila") / "model")


def train_and_save(run: RunConfig, folder: Path) -> None:
    """Two steps, saved; and exported, which is the truth about all weights."""
    process_groups.join()
    live = start(run)
    live.steps(0, 2)
    CheckpointManager(folder / "save").save(live.state, 2)
    export_model(live.model, run, live.groups, folder / "export")


def start_from(run: RunConfig, path: Path, export: Path) -> int:
    """Build from the checkpoint's weights and write what is held then; return the steps that the optimizer knows."""
    process_groups.join()
    live = start(run.replace(weights=WeightsConfig(pretrained_checkpoint=str(path))))
    export_model(live.model, run, live.groups, export)
    live.steps(0, 1)  # the rows that learn apart, and everything else that has to be connected
    return live.state.scheduler.num_steps - 1 + steps_taken(live.state.optimizer) - 1


Case = tuple[tuple[str, int, dict[str, Any]], tuple[str, int, dict[str, Any]]]
CASES: dict[str, Case] = {
    "new rows into a frozen vocabulary": (("infimm", 2, TP2_SP), ("infimm, all", 1, {})),
    "new rows, learning on": (("infimm", 2, PP2), ("infimm", 2, TP2)),
    "all trained, then frozen": (("infimm, all", 1, {}), ("infimm", 2, INTERLEAVED)),
    "a tower that learns": (("aquila_vl, stage 1", 2, PP2), ("aquila_vl", 2, TP2_SP)),
    "a tower that is frozen": (("aquila_vl", 2, TP2_SP), ("aquila_vl, stage 1", 2, {})),
    "a decoder with tied embeddings": (("decoder", 2, TP2), ("decoder", 2, PP2)),
}


@pytest.mark.parametrize("case", CASES)
def test_all_weights_arrive_whatever_was_trained(case: str, aquila: Path, tmp_path: Path) -> None:
    (family, ranks, degrees), (then, ranks_then, degrees_then) = CASES[case]
    spawn(train_and_save, ranks, run_of(family, aquila, degrees), tmp_path)
    path = random.Random(case).choice([tmp_path / "save", checkpoint_path(tmp_path / "save", 2)])
    assert spawn(start_from, ranks_then, run_of(then, aquila, degrees_then), path, tmp_path / "again")[0] == 0
    assert_same_folder(tmp_path / "again", tmp_path / "export")


def assert_same_folder(mine: Path, other: Path) -> None:
    with HFFolder.open(mine) as one, HFFolder.open(other) as two:
        assert one.names() == two.names()
        for name in one.names():
            assert torch.equal(one.read(name), two.read(name)), name


def weights_of(run: RunConfig) -> dict[str, Tensor]:
    """By the folder's names, as held in one process."""
    process_groups.join()
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    return {n: t.clone() for n, t in folder_tensors(model.parts(), state_map_of(run), groups.collection.tp)}


@pytest.fixture(scope="module")
def saved(aquila: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    spawn(train_and_save, 2, run_of("infimm", aquila, TP2), folder)
    return folder / "save"


def refused(run: RunConfig, path: Path, ranks: int = 2) -> str:
    run = run.replace(weights=WeightsConfig(pretrained_checkpoint=str(path)))
    with pytest.raises(RankFailed) as failed:
        spawn(weights_of, ranks, run)
    assert "\n" not in str(failed.value.error)
    return str(failed.value.error)


def test_what_is_no_checkpoint_of_this_model_is_refused(aquila: Path, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in refused(run_of("infimm", aquila, {}), tmp_path / "empty")
    assert "there is no such folder" in refused(run_of("infimm", aquila, {}), tmp_path / "none")
    wider = run_of("infimm", aquila, {})
    wider = wider.replace(decoder=wider.decoder.replace(ffn_hidden_size=wider.decoder.ffn_hidden_size * 2))
    message = refused(wider, saved)
    assert "decoder.ffn_hidden_size" in message and "take a checkpoint of the same model" in message
    assert "aquila_vl" in refused(run_of("aquila_vl", aquila, {}), saved)


def test_a_flipped_bit_is_refused_before_the_model_is_built(aquila: Path, saved: Path) -> None:
    draw = random.Random(5)
    files = [file for file in saved.rglob("*") if file.is_file() and file.parent != saved]
    for file in draw.sample(files, 4):
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        kept = file.read_bytes()
        file.write_bytes(content)
        assert file.name in refused(run_of("infimm", aquila, TP2), saved) or file.name == "COMMITTED"
        file.write_bytes(kept)
