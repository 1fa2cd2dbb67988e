"""Tar archives, read and written as streams: strictly, in memory, names being labels and never paths.

`tarfile` ends without a word where an archive is cut between two members, and trusts sizes; this reader does neither.
It knows what tar, GNU tar and Python write for plain files: ustar, long names, PAX paths and sizes, sizes beyond 8 GiB.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
RECORD = 20 * BLOCK
"""An archive's length is a multiple of this, as tar writes it."""
END = bytes(2 * BLOCK)

_LONGEST_NAME = 64 * 1024
"""Bytes of a long name or of a PAX header."""
_FILE_TYPES = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, pipes."""
_MOST_AT_ONCE = 2**20


class DamagedTar(ValueError):
    """What is wrong with an archive, and at which byte."""


class Stream(Protocol):
    """What archives are read from."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """A member of an archive."""

    name: str
    """A label: nothing is ever written under it."""
    is_file: bool
    """False for folders, links, devices."""
    offset: int
    """Where its content begins in the archive."""
    size: int
    start: int
    """Where the headers that tell of it begin."""


def member_header(name: str, size: int) -> bytes:
    """The header of a file that depends on its name and size alone."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int, to: int = BLOCK) -> bytes:
    """The zeros behind so many bytes that fill a block."""
    return bytes(-size % to)


class TarReader:
    """The members of an archive of `size` bytes in their order; DamagedTar where it breaks off or makes no sense.

    `skip` passes over so many bytes of the stream, where that is faster than reading them.
    """

    def __init__(self, stream: Stream, size: int, skip: Callable[[int], object] | None = None) -> None:
        self._stream, self._size, self._skip = stream, size, skip
        self._at = 0
        self._next = 0  # where the next header begins

    def __iter__(self) -> Iterator[Member]:
        name: str | None = None  # what a PAX header or a GNU long name says of the member behind it
        size: int | None = None
        start: int | None = None  # where the first such header begins
        while header := self._header():
            kind = header[156:157]
            if kind in (b"L", b"K", b"x") and start is None:
                start = self._at - BLOCK
            if kind == b"L":
                name = _text(self._extra(header).rstrip(b"\0"))
            elif kind == b"x":
                found = self._pax(self._extra(header))
                name, size = found.get("path", name), int(found["size"]) if "size" in found else size
            elif kind in (b"g", b"K"):
                self._member(header)  # for all members, or the target of a link: neither names nor sizes files
            elif kind == b"S":
                raise self._damage("a member is stored with holes")
            else:
                yield self._member(header, name, size, start)
                name, size, start = None, None, None

    def read(self, member: Member) -> bytes:
        """The content of the member that came last; its size is the caller's to limit."""
        assert self._at == member.offset, "only the member that came last can be read, and once"
        return self._take(member.size)

    def finish(self) -> None:
        """Read what is behind the end; DamagedTar where it is not empty."""
        is_empty = True
        while self._at < self._size:
            data = self._take(min(_MOST_AT_ONCE, self._size - self._at))
            is_empty = is_empty and not data.strip(b"\0")
        if not is_empty:
            raise self._damage("something follows the end of the archive")

    def _header(self) -> bytes | None:
        if self._skip is not None and self._at < self._next:
            self._skip(self._next - self._at)
            self._at = self._next
        while self._at < self._next:
            self._take(min(_MOST_AT_ONCE, self._next - self._at))
        header = self._take(BLOCK)
        if header.strip(b"\0"):
            self._check(header)
            return header
        if self._take(BLOCK).strip(b"\0"):
            raise self._damage("an empty block stands between members")
        return None

    def _check(self, header: bytes) -> None:
        expected = self._number(header[148:156])
        if expected != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
            raise self._damage("a header is damaged")

    def _extra(self, header: bytes) -> bytes:
        member = self._member(header)
        if member.size > _LONGEST_NAME:
            raise self._damage("a name is too long")
        return self.read(member)

    def _member(
        self, header: bytes, name: str | None = None, size: int | None = None, start: int | None = None
    ) -> Member:
        kind = header[156:157]
        length = self._number(header[124:136]) if size is None else size
        if kind in _WITHOUT_CONTENT:
            length = 0  # a link may state the size of its target
        if length > self._size - self._at:
            raise self._damage(f"a member of {length} bytes reaches past the end")
        self._next = self._at + length + -length % BLOCK
        name = _header_name(header) if name is None else name
        return Member(name, kind in _FILE_TYPES, self._at, length, self._at - BLOCK if start is None else start)

    def _pax(self, content: bytes) -> dict[str, str]:
        """Path and size of a PAX header's lines, `length key=value`."""
        found: dict[str, str] = {}
        while content and content[0]:
            length = content.partition(b" ")[0]
            if not (length.isdigit() and len(length) < 8 and len(length) < int(length) <= len(content)):
                raise self._damage("a PAX header is damaged")
            key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
            content = content[int(length) :]
            if key == b"size" and not (value.isdigit() and len(value) < 20):
                raise self._damage("a PAX header is damaged")
            if key in (b"path", b"size"):
                found[key.decode()] = _text(value)
        return found

    def _number(self, field: bytes) -> int:
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.replace(b"\0", b" ").strip()
        if digits.strip(b"01234567"):
            raise self._damage("a header is damaged")
        return int(digits or b"0", 8)

    def _take(self, count: int) -> bytes:
        data = self._stream.read(count)
        self._at += len(data)
        if len(data) < count:
            raise self._damage("it ends without an end mark" if self._at >= self._size else "it cannot be read on")
        return data

    def _damage(self, problem: str) -> DamagedTar:
        return DamagedTar(f"{problem}, before byte {self._at}")


def _header_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
