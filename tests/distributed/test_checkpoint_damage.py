"""Checkpoints that are damaged, hostile, of another run, or that could not be written."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import OVERLAPPED, PP2, Live, aquila_folder, assert_same_bits, fingerprint, run_of, start
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from megavlm.build.run_config import RunConfig
from megavlm.checkpoint.manager import CheckpointManager
from megavlm.checkpoint.restricted_pickle import metadata_bytes, read_metadata
from megavlm.checkpoint.sealed import MANIFEST_FILE, MARK_FILE, FileEntry, read_seal, seal
from megavlm.checkpoint.shelf import checkpoint_path, steps_saved
from megavlm.errors import CheckpointError
from megavlm.parallel import groups as process_groups
from megavlm.testing import spawn

DAMAGES = 200


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aquila_folder(tmp_path_factory.mktemp("aquila") / "model")


def saved(run: RunConfig, folder: Path) -> Live:
    """A run that has saved its first step."""
    process_groups.join()
    live = start(run)
    live.step(0)
    CheckpointManager(folder).save(live.state, 1)
    return live


@contextmanager
def damage(path: Path, draw: random.Random) -> Iterator[str]:
    """One random damage of a folder, said in words and undone afterwards."""
    file = path / draw.choice(sorted(item.name for item in path.iterdir()))
    content = file.read_bytes()
    kind = draw.choice(["flipped", "cut", "missing", "extra"])
    try:
        if kind == "flipped":
            place = draw.randrange(8 * len(content))
            changed = bytearray(content)
            changed[place // 8] ^= 1 << place % 8
            file.write_bytes(changed)
        elif kind == "cut":
            file.write_bytes(content[: draw.randrange(len(content))])
        elif kind == "missing":
            file.unlink()
        else:
            file.with_name(f"{file.name}x").write_bytes(content)
        yield f"{kind} {file}"
    finally:
        file.write_bytes(content)
        file.with_name(f"{file.name}x").unlink(missing_ok=True)


def refuse_every_damage(run: RunConfig, folder: Path) -> None:
    live = saved(run, folder)
    live.step(1)
    before = fingerprint(live)
    (frozen,) = folder.glob("frozen-*")
    draw = random.Random(7)
    for _ in range(DAMAGES):
        broken = draw.choice([checkpoint_path(folder, 1), frozen])
        with damage(broken, draw) as what:
            try:
                CheckpointManager(folder).load_latest(live.state)
            except CheckpointError as error:
                assert broken.name in error.where, f"{what}: {error}"
            else:
                raise AssertionError(f"{what} was not noticed")
    assert_same_bits(fingerprint(live), before)
    assert CheckpointManager(folder).load_latest(live.state) == 1


def test_200_of_200_damages_are_refused_before_the_model_is_touched(weights: Path, tmp_path: Path) -> None:
    spawn(refuse_every_damage, 1, run_of("aquila_vl, stage 1", weights, {}), tmp_path)


class Opener:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.path), "w")


def put(path: Path, content: bytes) -> None:
    """Replace a file of a sealed folder and seal it again, as somebody who means harm would."""
    names = set(read_seal(path.parent))
    path.write_bytes(content)
    for name in (MANIFEST_FILE, MARK_FILE):
        (path.parent / name).unlink()
    seal(path.parent, {name: entry_of(path.parent / name) for name in names})


def entry_of(path: Path) -> FileEntry:
    content = path.read_bytes()
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def pointing_to(metadata: Metadata, length: int) -> Metadata:
    """Every tensor read from the start of the shard."""
    metadata.storage_data = {i: _StorageInfo("__0_0.distcp", 0, length) for i in metadata.storage_data}
    return metadata


def refuse_pickles(run: RunConfig, folder: Path, trap: Path) -> None:
    live = saved(run, folder)
    before = fingerprint(live)
    path = checkpoint_path(folder, 1)
    as_torch = io.BytesIO()
    torch.save({"iteration": Opener(trap)}, as_torch)
    for name, content in ((".metadata", pickle.dumps(Opener(trap))), ("common.pt", as_torch.getvalue())):
        good = (path / name).read_bytes()
        put(path / name, content)
        with pytest.raises(CheckpointError, match=name):
            CheckpointManager(folder).load_latest(live.state)
        put(path / name, good)
    metadata = read_metadata(path)
    for content in (b"", b"\x80\x04N.", pickle.dumps(["no metadata"])):
        put(path / ".metadata", content)
        with pytest.raises(CheckpointError, match=r"\.metadata.*no list of tensors"):
            CheckpointManager(folder).load_latest(live.state)
    put(path / ".metadata", metadata_bytes(pointing_to(metadata, len(as_torch.getvalue()))))
    put(path / "__0_0.distcp", as_torch.getvalue())
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointManager(folder).load_latest(live.state)
    assert not trap.exists()
    assert_same_bits(fingerprint(live), before)
    pickle.loads(pickle.dumps(Opener(trap))).close()
    assert trap.exists(), "the trap does not work"


def test_a_pickle_that_runs_code_is_refused(weights: Path, tmp_path: Path) -> None:
    spawn(refuse_pickles, 1, run_of("aquila_vl, stage 1", weights, {}), tmp_path / "run", tmp_path / "trap")


def fall_back(run: RunConfig, folder: Path) -> None:
    live = saved(run, folder)
    CheckpointManager(folder).save(live.state, 2)
    if live.groups.rank == 0:
        os.truncate(checkpoint_path(folder, 2) / "run.json", 10)
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match=r"iter_0000002.run\.json"):
        CheckpointManager(folder).load_latest(live.state)
    told = CheckpointManager(folder, load_previous_if_damaged=True)
    assert told.load_latest(live.state) == 1
    told.save(live.state, 2)
    assert CheckpointManager(folder).load_latest(live.state) == 2
    torch.distributed.barrier()
    if live.groups.rank == 0:
        shutil.rmtree(checkpoint_path(folder, 2))
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match="latest_checkpointed"):
        CheckpointManager(folder).load_latest(live.state)
    assert told.load_latest(live.state) == 1


def test_the_previous_checkpoint_stands_in_only_when_told(weights: Path, tmp_path: Path) -> None:
    spawn(fall_back, 2, run_of("aquila_vl, stage 1", weights, PP2), tmp_path)


def refuse_strangers(run: RunConfig, strangers: dict[str, RunConfig], folder: Path) -> None:
    live = saved(run, folder)
    for what, other in strangers.items():
        live = start(other)
        before = fingerprint(live)
        with pytest.raises(CheckpointError, match=what):
            CheckpointManager(folder).load_latest(live.state)
        assert_same_bits(fingerprint(live), before)


def test_a_checkpoint_of_another_run_is_refused_by_name(weights: Path, tmp_path: Path) -> None:
    run = run_of("decoder", weights, {})
    stage_1 = run_of("aquila_vl, stage 1", weights, {})
    bare = {
        r"decoder\.num_layers = 4: this run has 2": run.replace(decoder=run.decoder.replace(num_layers=2)),
        "params_dtype = 'float32'": run_of("decoder", weights, {}, dtype="bfloat16"),
        "aquila_vl": stage_1,
    }
    spawn(refuse_strangers, 1, run, bare, tmp_path / "decoder")
    other_weights = aquila_folder(tmp_path / "other", seed=1)
    eyes = {
        "trainable": run_of("aquila_vl", weights, {}),
        r"frozen-\w+: image_newline": run_of("aquila_vl, stage 1", other_weights, {}),
    }
    spawn(refuse_strangers, 1, stage_1, eyes, tmp_path / "eyes")


def fail_to_write(run: RunConfig, folder: Path) -> None:
    """Rank 1 meets the end of its disk, in the place of which stands a limit on the size of its files."""
    live = saved(run, folder)
    manager = CheckpointManager(folder, max_save_failures=3, keep_last=1)
    assert manager.load_latest(live.state) == 1
    frozen = [path.name for path in folder.glob("frozen-*")]
    assert len(frozen) == 1
    kept = sorted(["iter_0000001", *frozen, "latest_checkpointed_iteration.txt"])
    with small_files(100 if live.groups.rank == 1 else None):
        for step in (2, 3):
            manager.save(live.state, step)
            torch.distributed.barrier()
            assert sorted(os.listdir(folder)) == kept
            torch.distributed.barrier()
    live.step(1)
    manager.save(live.state, 4)  # there is room again: the count starts anew
    assert manager.last_saved == 4 and steps_saved(folder) == [4]
    with small_files(100 if live.groups.rank == 1 else None):
        for step in (5, 6):
            manager.save(live.state, step)
        with pytest.raises(CheckpointError, match="3 checkpoints in a row.* step 4"):
            manager.save(live.state, 7)
    assert CheckpointManager(folder).load_latest(live.state) == 4


@contextmanager
def small_files(limit: int | None) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit is not None else old[0], old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("family", ["aquila_vl, stage 1", "infimm"])
def test_a_full_disk_stops_the_run_after_some_saves(family: str, weights: Path, tmp_path: Path) -> None:
    run = run_of(family, weights, {}, OVERLAPPED)
    spawn(fail_to_write, 2, run, tmp_path)


def fail_to_finish(run: RunConfig, folder: Path, background: bool) -> None:
    """All shards are written, and rank 0 cannot do the rest; or the frozen weights cannot be written."""
    process_groups.join()
    live = start(run)
    manager = CheckpointManager(folder, max_save_failures=9, async_save=background)
    with small_files(100 if live.groups.rank == 0 else None):
        manager.save(live.state, 1)  # the frozen weights come first
        manager.finish(live.state)
    torch.distributed.barrier()
    assert not steps_saved(folder) and not list(folder.glob("*frozen*"))
    blocker = checkpoint_path(folder, 2)
    torch.distributed.barrier()
    if live.groups.rank == 0:
        blocker.write_text("in the way")
    torch.distributed.barrier()
    manager.save(live.state, 2)
    manager.finish(live.state)
    assert manager.last_saved is None
    torch.distributed.barrier()
    if live.groups.rank == 0:
        blocker.unlink()
    torch.distributed.barrier()
    manager.save(live.state, 3)
    manager.finish(live.state)
    assert manager.last_saved == 3


@pytest.mark.parametrize("background", [False, True])
def test_what_rank_0_cannot_write_holds_up_nobody(background: bool, weights: Path, tmp_path: Path) -> None:
    spawn(fail_to_finish, 2, run_of("aquila_vl, stage 1", weights, PP2), tmp_path, background)


def keep_some(run: RunConfig, folder: Path) -> None:
    live = saved(run, folder)
    manager = CheckpointManager(folder, keep_last=1, keep_every=2)
    stranger = folder / f"frozen-{'0' * 32}"
    if live.groups.rank == 0:
        stranger.mkdir()
    for step in range(2, 6):
        manager.save(live.state, step)
    torch.distributed.barrier()
    assert steps_saved(folder) == [2, 4, 5]
    assert not stranger.exists(), "no checkpoint refers to it"
    assert CheckpointManager(folder).load_latest(live.state) == 5


def test_old_checkpoints_go_and_what_they_need_stays(weights: Path, tmp_path: Path) -> None:
    spawn(keep_some, 2, run_of("infimm", weights, {}), tmp_path)
