"""Where shards lie: a local folder, or an object store through fsspec. Reading only; every failure is a DataError."""

from __future__ import annotations

import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from megavlm.errors import DataError

MOST_OPEN_FILES = 256
STREAM_BLOCK = 4 * 2**20
"""Bytes read at once where a file is read whole."""
TRIES = 5
"""Of a remote read, before it counts as failed."""
FIRST_WAIT = 0.5
"""Seconds before the second try of a remote read; each further wait is twice as long."""

Result = TypeVar("Result")


class Store(Protocol):
    """A folder of files that are read."""

    folder: str

    def names(self) -> list[str]:
        """The tar files in and under the folder, sorted, hidden ones left out."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str, offset: int, count: int) -> bytes:
        """So many bytes of a file from an offset on, all of them."""


def open_store(folder: str | Path, tries: int = TRIES, first_wait: float = FIRST_WAIT) -> Store:
    """The store of a local folder or of a URL, such as s3://bucket/folder."""
    if "://" in str(folder):
        return RemoteStore(str(folder), tries, first_wait)
    return LocalStore(str(folder))


def open_stream(store: Store, name: str, size: int) -> io.BufferedReader:
    """A file of `size` bytes, to be read from its beginning to its end."""
    return io.BufferedReader(_Stream(store, name, size), STREAM_BLOCK)


def is_plain(name: str) -> bool:
    """Whether a name stays inside of the folder that it is relative to."""
    parts = name.split("/")
    return parts[0] != "" and ".." not in parts and parts[-1] not in ("", ".") and "\0" not in name


class _Stream(io.RawIOBase):
    """A file of a store as Python's streams want it, each of its blocks a read of its own that may be tried again."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store, self._name, self._size = store, name, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), STREAM_BLOCK, self._size - self._at)
        buffer[:count] = self._store.read(self._name, self._at, count) if count else b""
        self._at += count
        return count


class LocalStore:
    """A folder of this machine. Many threads may read at once, and processes forked from this one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        root = Path(self.folder)
        if not root.is_dir():
            raise DataError("dataset", self.folder, "is no folder", "check the path")
        paths = (path.relative_to(root).as_posix() for path in root.rglob("*.tar"))
        return sorted(name for name in paths if _is_shown(name))

    def size(self, name: str) -> int:
        return self._guard(name, lambda: os.stat(self._path(name)).st_size)

    def read(self, name: str, offset: int, count: int) -> bytes:
        data = self._guard(name, lambda: self._pread(name, offset, count))
        if len(data) < count:
            raise _failure(self.folder, name, f"ends before byte {offset + count}")
        return data

    def _pread(self, name: str, offset: int, count: int) -> bytes:
        file = self._file(name)
        # Checked first, since a buffer of `count` bytes is made before anything is read.
        if offset + count > os.fstat(file.fileno()).st_size:
            return b""
        data = os.pread(file.fileno(), count, offset)
        while 0 < len(data) < count:  # Linux gives at most 2 GiB at once, network file systems less
            more = os.pread(file.fileno(), count - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _file(self, name: str) -> BinaryIO:
        # A file that leaves the cache is closed once the last reader lets go of it: no reader loses it meanwhile.
        with self._lock:
            file = self._files.pop(name, None)
            if file is None:
                file = open(self._path(name), "rb", buffering=0)  # noqa: SIM115
            self._files[name] = file
            while len(self._files) > MOST_OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def _path(self, name: str) -> str:
        assert is_plain(name), name
        return os.path.join(self.folder, name)

    def _guard(self, name: str, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except FileNotFoundError:
            raise _failure(self.folder, name, "is missing") from None
        except OSError as error:
            raise _failure(self.folder, name, f"cannot be read: {error.strerror or error}") from None


class RemoteStore:
    """A folder of an object store. A read that fails is tried again after a while."""

    def __init__(self, url: str, tries: int = TRIES, first_wait: float = FIRST_WAIT) -> None:
        import fsspec.core

        self.folder = url.rstrip("/")
        self._tries, self._first_wait = tries, first_wait
        try:
            self._system, path = fsspec.core.url_to_fs(self.folder)
        except (ImportError, ValueError) as error:
            raise DataError("dataset", url, f"cannot be opened: {error}", "check the URL") from None
        self._root = str(path).rstrip("/")

    def names(self) -> list[str]:
        found = self._retry("", lambda: self._system.find(self._root))
        names = (str(path)[len(self._root) :].lstrip("/") for path in found)
        return sorted(name for name in names if name.endswith(".tar") and _is_shown(name) and is_plain(name))

    def size(self, name: str) -> int:
        return int(self._retry(name, lambda: self._system.size(self._path(name))))

    def read(self, name: str, offset: int, count: int) -> bytes:
        def attempt() -> bytes:
            data = self._system.cat_file(self._path(name), start=offset, end=offset + count)
            if len(data) < count and offset + count <= self._system.size(self._path(name)):
                raise OSError("the answer broke off")
            return data

        data: bytes = self._retry(name, attempt)
        if len(data) < count:
            raise _failure(self.folder, name, f"ends before byte {offset + count}")
        return data

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _retry(self, name: str, action: Callable[[], Any]) -> Any:
        for attempt in range(1, self._tries + 1):
            try:
                return action()
            except FileNotFoundError:
                raise _failure(self.folder, name, "is missing") from None
            except Exception as error:  # each kind of store has its own
                if attempt == self._tries:
                    problem = f"cannot be read in {self._tries} tries: {type(error).__name__}: {error}"
                    raise _failure(self.folder, name, problem) from None
            time.sleep(self._first_wait * 2 ** (attempt - 1))
        raise AssertionError("at least one try")


def _is_shown(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def _failure(folder: str, name: str, problem: str) -> DataError:
    place = f"{folder}/{name}" if name else folder
    return DataError("shard", place, problem, "copy it again, or prepare it again")
