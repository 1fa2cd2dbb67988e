"""A folder that appears under its name whole or not at all.

It is written under a staging name beside the final one, synced to disk, and renamed. An interrupted try leaves the
staging folder behind, which the next try removes. One program at a time writes to one final name; its processes may
share the staging folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megavlm.errors import ConfigError

SUMS_FILE = "SHA256SUMS"


def staging_path(final: str | Path) -> Path:
    """Where the files of `final` are written until it is committed: the same for every process."""
    final = _target(final)
    return final.with_name(f".{final.name}.partial")


def open_staging(final: str | Path, overwrite: bool = False) -> Path:
    """Make the empty staging folder of `final`; what an interrupted earlier try left is cleared away."""
    final = _target(final)
    replaced = _replaced(final)
    if replaced.exists():
        # The earlier try ended within `commit`: after its rename the old folder is rubbish, before it the only one.
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    _refuse_existing(final, overwrite)
    staging = staging_path(final)
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise ConfigError("output folder", str(final), problem, "give a folder that you may write to") from error
    return staging


def commit(staging: Path, final: str | Path, overwrite: bool = False) -> None:
    """Sync the staging folder to disk and give it its final name."""
    final = _target(final)
    for path in (*staging.rglob("*"), staging):
        _sync(path)
    _refuse_existing(final, overwrite)
    if final.exists():
        final.rename(_replaced(final))
    staging.rename(final)
    _sync(final.parent)
    if _replaced(final).exists():
        shutil.rmtree(_replaced(final))


@contextmanager
def atomic_folder(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """The staging folder to write into: renamed to `final` at the end of the block, removed if the block raises."""
    staging = open_staging(final, overwrite)
    try:
        yield staging
        commit(staging, final, overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Give a small file this content: it changes at once or not at all."""
    staging = staging_path(path)
    staging.write_bytes(content)
    _sync(staging)
    staging.replace(path)
    _sync(path.parent)


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """List every file of the folder for `sha256sum --check`; sums that are `known` by relative path are taken."""
    known = known or {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{known.get(name) or file_sum(folder / name)}  {name}\n" for name in names if name != SUMS_FILE]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def file_sum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _target(final: str | Path) -> Path:
    # Through links, so that staging lies on the file system of the target, where a rename is atomic.
    return Path(final).resolve()


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _refuse_existing(final: Path, overwrite: bool) -> None:
    if final.exists() and not final.is_dir():
        raise ConfigError("output folder", str(final), "is a file", "give another name")
    if final.exists() and not overwrite:
        raise ConfigError("output folder", str(final), "exists already", "give another name, or allow overwriting")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
