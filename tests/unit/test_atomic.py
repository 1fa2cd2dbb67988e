"""Folders that appear whole or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megavlm.checkpoint.atomic import SUMS_FILE, atomic_folder, commit, open_staging, staging_path, write_sums
from megavlm.errors import ConfigError


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old_folder(path: Path) -> Path:
    path.mkdir()
    (path / "old").write_text("old")
    return path


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "parent" / "final"
    with atomic_folder(final) as staging:
        assert staging == staging_path(final) and staging.parent == final.parent
        (staging / "sub").mkdir()
        (staging / "sub" / "a").write_text("a")
        assert not final.exists()
    assert listing(final.parent) == ["final"]
    assert (final / "sub" / "a").read_text() == "a"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "final") as staging:
        (staging / "a").write_text("a")
        raise KeyboardInterrupt
    assert listing(tmp_path) == []


def test_an_existing_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    final = old_folder(tmp_path / "final")
    with pytest.raises(ConfigError, match="final': exists already; give another name, or allow overwriting"):
        open_staging(final)
    assert listing(tmp_path) == ["final"] and listing(final) == ["old"]


def test_a_folder_that_came_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"), atomic_folder(tmp_path / "final"):
        old_folder(tmp_path / "final")
    assert listing(tmp_path) == ["final"] and listing(tmp_path / "final") == ["old"]


def test_a_file_of_the_name_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "final").write_text("precious")
    with pytest.raises(ConfigError, match="final': is a file; give another name"):
        open_staging(tmp_path / "final", overwrite=True)
    assert (tmp_path / "final").read_text() == "precious"


def test_overwriting_replaces_the_folder_only_at_the_end(tmp_path: Path) -> None:
    final = old_folder(tmp_path / "final")
    with atomic_folder(final, overwrite=True) as staging:
        (staging / "new").write_text("new")
        assert listing(final) == ["old"]
    assert listing(tmp_path) == ["final"] and listing(final) == ["new"]


def test_overwriting_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "target")
    link = tmp_path / "link"
    link.symlink_to(target)
    with atomic_folder(link, overwrite=True) as staging:
        (staging / "new").write_text("new")
    assert link.is_symlink() and listing(target) == ["new"] and listing(tmp_path) == ["link", "target"]


def test_the_staging_folder_of_an_earlier_try_is_cleared(tmp_path: Path) -> None:
    (open_staging(tmp_path / "final") / "half").write_text("ha")
    staging = open_staging(tmp_path / "final")
    assert listing(staging) == []
    commit(staging, tmp_path / "final")
    assert listing(tmp_path) == ["final"]


def test_an_old_folder_is_restored_after_a_try_that_died_between_the_renames(tmp_path: Path) -> None:
    old_folder(tmp_path / ".final.replaced")
    with pytest.raises(ConfigError, match="exists already"):
        open_staging(tmp_path / "final")
    assert listing(tmp_path) == ["final"] and listing(tmp_path / "final") == ["old"]


def test_an_old_folder_is_removed_after_a_try_that_died_behind_the_renames(tmp_path: Path) -> None:
    old_folder(tmp_path / ".final.replaced")
    (tmp_path / "final").mkdir()
    staging = open_staging(tmp_path / "final", overwrite=True)
    assert listing(tmp_path) == [staging.name, "final"]


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b", "a b", "sub/c"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    write_sums(tmp_path)  # the list does not list itself
    check = ["sha256sum", "--check", "--strict", SUMS_FILE]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, text=True).stdout == "a b: OK\nb: OK\nsub/c: OK\n"
    (tmp_path / "b").write_text("B")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 1


def test_known_sums_are_not_computed_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    write_sums(tmp_path, {"a": "0" * 64})
    assert (tmp_path / SUMS_FILE).read_text() == f"{'0' * 64}  a\n"
