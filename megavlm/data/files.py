"""Files that appear under their names, and lines that appear in them, whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""What the temporary names of files end with that are still being written."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write: synced and renamed to `path` at the end of the block, removed where the block raises."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_whole(file: int, content: bytes) -> None:
    """Append all of it to an open file, or nothing: what a full disk took of it is cut off behind the OSError."""
    size = os.fstat(file).st_size
    try:
        while content:
            content = content[os.write(file, content) :]
    except OSError:
        os.ftruncate(file, size)
        raise


def open_to_append(path: Path) -> int:
    """For `append_whole`."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last beyond a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
