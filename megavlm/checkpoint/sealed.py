"""Folders that prove their content: a list of names, sizes and SHA-256 sums, and a mark that covers the list.

A sum is taken of the bytes as they are written, by the process that writes them. A reader believes a folder that holds
exactly the files of its list, each with its size and its sum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megavlm.checkpoint.atomic import SUMS_FILE
from megavlm.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
MARK_FILE = "COMMITTED"

_LARGEST_LIST = 2**28
_SUM = re.compile("[0-9a-f]{64}")
_REMEDY = "take another checkpoint, or start again with --load-previous-if-damaged"


@dataclass(frozen=True)
class FileEntry:
    """What a file must be; the size is unknown (None) in lists of sums alone."""

    size: int | None
    sha256: str


class HashedFile:
    """A new file, with the SHA-256 of what has been written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> FileEntry:
        """Have it on disk, and say what it is."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Let go of a file that cannot be written to its end."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still in memory once more
            self._file.close()


def write_file(path: Path, content: bytes) -> FileEntry:
    """A whole file at once."""
    file = HashedFile(path)
    file.write(content)
    return file.close()


def seal(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Write the list of all files of the folder, then the mark."""
    listed = {name: asdict(files[name]) for name in sorted(files)}
    entry = write_file(folder / MANIFEST_FILE, (json.dumps({"files": listed}, indent=1) + "\n").encode())
    write_file(folder / MARK_FILE, _mark(entry.sha256))


def read_seal(folder: Path) -> dict[str, FileEntry]:
    """The files of a sealed folder with what they must be; names and sizes are checked here, sums are left to do."""
    content = _read(folder / MANIFEST_FILE)
    mark = _read(folder / MARK_FILE)
    if mark != _mark(hashlib.sha256(content).hexdigest()):
        raise _damaged(folder / MARK_FILE, mark.decode(errors="replace"), f"does not belong to {MANIFEST_FILE}")
    try:
        listed = json.loads(content)["files"]
        entries = {str(name): FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder / MANIFEST_FILE, str(error), "is no list of files") from error
    _check_listing(folder, entries, {MANIFEST_FILE, MARK_FILE})
    return entries


def read_sums(folder: Path) -> dict[str, FileEntry]:
    """The same of a folder whose list is in the format of `sha256sum`."""
    path = folder / SUMS_FILE
    entries = {}
    for line in _read(path).decode(errors="replace").split("\n")[:-1]:
        entries[line[66:]] = FileEntry(None, line[:64])
        if line[64:66] != "  ":
            raise _damaged(path, line, "is no line of a sum and a name")
    _check_listing(folder, entries, {SUMS_FILE})
    return entries


def check_file(path: Path, entry: FileEntry) -> int:
    """Refuse a file whose bytes are not those that were written; return their number."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    if found != entry.sha256:
        raise _damaged(path, found, f"is not the SHA-256 {entry.sha256} of the bytes that were written")
    return size


def _mark(manifest_sum: str) -> bytes:
    return f"{manifest_sum}  {MANIFEST_FILE}\n".encode()


def _check_listing(folder: Path, entries: Mapping[str, FileEntry], beside: set[str]) -> None:
    for name, entry in entries.items():
        # A name like ../x must not lead out of the folder.
        if Path(name).name != name or name in beside or not _SUM.fullmatch(entry.sha256):
            raise _damaged(folder, name, "stands in its list of files and cannot")
    found = {item.name: item for item in os.scandir(folder)}
    for name in sorted((entries.keys() | beside) - found.keys()):
        raise _damaged(folder, name, "is missing")
    for name in sorted(found):
        if name not in entries and name not in beside:
            raise _damaged(folder, name, "does not belong to it")
        if not found[name].is_file(follow_symlinks=False):
            raise _damaged(folder, name, "is no plain file")
        size, expected = found[name].stat().st_size, entries[name].size if name in entries else None
        if expected is not None and size != expected:
            raise _damaged(folder / name, size, f"bytes are there, {expected} were written")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise _damaged(path.parent, path.name, "is missing")
    size = path.stat().st_size
    if size > _LARGEST_LIST:
        raise _damaged(path, size, f"bytes are more than {_LARGEST_LIST}")
    return path.read_bytes()


def _damaged(where: Path, value: Any, problem: str) -> CheckpointError:
    return CheckpointError(str(where), value, problem, _REMEDY)
