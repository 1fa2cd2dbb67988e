"""Which checkpoints are found, pointed to, kept, and cleared away."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megavlm.build.run_config import CheckpointConfig, RunConfig
from megavlm.checkpoint.sealed import FileEntry, read_seal, seal, write_file
from megavlm.checkpoint.shelf import (
    LATEST_FILE,
    clear_leftovers,
    latest_step,
    read_run,
    set_latest,
    steps_saved,
    steps_to_drop,
)
from megavlm.errors import CheckpointError, ConfigError
from megavlm.options import parse_options
from megavlm.recipes import recipe


def test_the_latest_checkpoint_is_the_one_pointed_to(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    for name in ("iter_0000010", "iter_0000020", "iter_10000000", "iter_20", ".iter_0000030.partial"):
        (tmp_path / name).mkdir()
    assert steps_saved(tmp_path) == [10, 20, 10_000_000]
    assert latest_step(tmp_path) == 10_000_000  # killed before it was ever pointed to
    set_latest(tmp_path, 10)
    assert (tmp_path / LATEST_FILE).read_text() == "10\n"
    assert latest_step(tmp_path) == 10


@pytest.mark.parametrize("text", ["30\n", "release", "", "1O"])
def test_a_pointer_to_nothing_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / LATEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=LATEST_FILE):
        latest_step(tmp_path)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "dropped"),
    [(None, None, []), (2, None, [10, 20, 30]), (2, 20, [10, 30]), (1, 30, [10, 20, 40]), (9, None, [])],
)
def test_old_checkpoints_go(keep_last: int | None, keep_every: int | None, dropped: list[int]) -> None:
    # 90 is of a run that was wound back to before it.
    steps = [10, 20, 30, 40, 50, 90]
    random.shuffle(steps)
    assert steps_to_drop(steps, 50, keep_last, keep_every) == dropped


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    kept = ["iter_0000010", "frozen-" + "0" * 32, ".other.partial", "notes"]
    gone = [".iter_0000020.partial", ".iter_0000010.replaced", ".iter_0000005.dropped", f".frozen-{'a' * 32}.partial"]
    for name in (*kept, *gone, ".iter_0000030.replaced"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path)
    # What was about to be replaced, and was not, is the only one of its name.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "iter_0000030"])


def sealed_folder(path: Path) -> Path:
    path.mkdir()
    seal(path, {name: write_file(path / name, name.encode()) for name in ("a", "b")})
    return path


def test_a_sealed_folder_says_what_it_holds(tmp_path: Path) -> None:
    entries = read_seal(sealed_folder(tmp_path / "sealed"))
    assert {name: entry.size for name, entry in entries.items()} == {"a": 1, "b": 1}


def test_a_list_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"")
    folder = tmp_path / "sealed"
    folder.mkdir()
    seal(folder, {"../outside": FileEntry(0, "0" * 64)})
    with pytest.raises(CheckpointError, match="outside"):
        read_seal(folder)


def test_a_link_is_no_file(tmp_path: Path) -> None:
    folder = sealed_folder(tmp_path / "sealed")
    (folder / "b").rename(tmp_path / "b")
    (folder / "b").symlink_to(tmp_path / "b")
    with pytest.raises(CheckpointError, match="no plain file"):
        read_seal(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1}', "[" * 100_000, '{"format": 1, "step": 1, "frozen": "../x"}']
)
def test_a_record_that_lies_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match="run.json"):
        read_run(tmp_path)


def test_options_are_those_of_megatron() -> None:
    words = ["--save", "a", "--load", "b", "--save-interval", "5", "--async-save", "--keep-last", "2"]
    expected = CheckpointConfig(
        save_to="a", load_from="b", save_interval=5, async_save=True, keep_last=2, keep_every=10
    )
    run: RunConfig = parse_options(recipe("decoder-tiny"), [*words, "--keep-every", "10"])
    assert run.checkpoint == expected
    with pytest.raises(ConfigError, match="--save-interval"):
        parse_options(recipe("decoder-tiny"), ["--save-interval", "0"])
