"""Files that appear under their names, and lines that appear in them, whole or not at all.

Logs and ledgers of a run are lines of JSON, each with a number that rises through the file. A run that goes on cuts
them where it begins again, and reads no more of them than that takes.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"
"""What the temporary names of files end with that are still being written."""
LONGEST_LINE = 64 << 20
"""Nothing that we write comes near: it is about as much as the names of four million samples."""
AT_ONCE = 1 << 20
"""Bytes that are read at once where ends of lines are looked for."""


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


def where_to_cut(path: Path, number_of: Callable[[int, bytes], int | None], first: int) -> int:
    """The place in a file behind the last line whose number is below `first`.

    `number_of` tells a line's number, from 0 on, from where it begins and what it says; lines without one go with what
    is cut off. Only the lines behind that place are read, and the one before it: how long the file is does not matter.
    """
    if first <= 0:
        return 0
    with path.open("rb") as file:
        for begin, line in lines_from_end(file):
            number = number_of(begin, line)
            if number is not None and number < first:
                return begin + len(line)
    return 0


def lines_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it begins, a line with its end), the last one first; of a line beyond LONGEST_LINE only its beginning."""
    end = file.seek(0, os.SEEK_END)
    for begin, first, chunk in _begins(file, end):
        if end - first <= len(chunk):
            yield begin, chunk[begin - first : end - first]
        else:
            file.seek(begin)
            yield begin, file.read(min(end - begin, LONGEST_LINE))
        end = begin


def _begins(file: BinaryIO, size: int) -> Iterator[tuple[int, int, bytes]]:
    """Where the lines of a file begin, the last one first, each with a part of the file: (its beginning, its bytes)."""
    first, last, chunk = 0, size, b""
    while last > 0:
        first = max(0, last - AT_ONCE)
        file.seek(first)
        chunk = file.read(last - first)
        place = chunk.rfind(b"\n")
        while place >= 0:
            if first + place + 1 < size:
                yield first + place + 1, first, chunk
            place = chunk.rfind(b"\n", 0, place)
        last = first
    if size > 0:
        yield 0, first, chunk


def numbered_line(line: bytes, key: str) -> dict[str, Any] | None:
    """A line's object; None where it is none, or has no number from 0 on under the key."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    number = found.get(key) if isinstance(found, dict) else None
    return found if type(number) is int and number >= 0 else None
