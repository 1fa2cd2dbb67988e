"""Tar files as entries: one record for the members that share a name up to its first dot, as WebDataset has it.

Members are read in memory, one record at a time; nothing is ever extracted, and links, devices and sparse members are
passed over. A tar that breaks off gives what it holds, and then one refusal that says so.
"""

from __future__ import annotations

import functools
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from megavlm.data.readers.base import MIB, Bad, Container, Entry, ReadOptions, Record
from megavlm.errors import DataError

MEMBERS = "members"
"""Field of a tar's record: a list of (suffix in lower case, content), in the order of the tar."""
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


@dataclass
class _Group:
    """The members of one record; their contents are there already where a compressed tar can't go back to them."""

    key: str
    members: list[tuple[str, tarfile.TarInfo]] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    size: int = 0
    problem: str = ""

    def add(self, suffix: str, member: tarfile.TarInfo, options: ReadOptions) -> None:
        self.size += member.size
        if self.size > options.most_record_mib * MIB:
            self.problem = f"record too large: {self.key} has more than {options.most_record_mib} MiB"
        if len(self.members) > options.most_pictures:
            self.problem = f"too many pictures: {self.key} has more than {options.most_pictures} members"
        if not self.problem:
            self.members.append((suffix, member))


def entries(path: Path, options: ReadOptions) -> Iterator[Entry]:
    """The records of a tar, plain or compressed."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            yield from _entries(tar, tar.fileobj is file, options)
    except tarfile.ReadError as error:
        raise DataError("source", str(path), f"is no tar: {error}", "copy it again, or leave it out") from None
    except OSError as error:
        raise DataError("source", str(path), f"cannot be read: {error}", "check the path") from None


def count(path: Path, options: ReadOptions) -> int:
    """How many entries there are."""
    return sum(1 for _ in entries(path, options))


TAR = Container(entries, count, (".tar", ".tar.gz", ".tgz"))


def _entries(tar: tarfile.TarFile, is_plain: bool, options: ReadOptions) -> Iterator[Entry]:
    group: _Group | None = None
    problem = ""
    for member in _members(tar):
        if isinstance(member, str):
            problem = member
            break
        match = _NAME.fullmatch(member.name)
        if match is None or not member.isreg() or member.issparse():
            continue
        if group is None or group.key != match[1]:
            if group is not None:
                yield functools.partial(_load, tar, group)
            group = _Group(match[1])
        group.add(match[2].lower(), member, options)
        if not is_plain and not group.problem:
            try:
                group.contents.append(_content(tar, member))
            except Bad as bad:
                group.problem = str(bad)
    if group is not None:
        yield functools.partial(_load, tar, group)
    if problem:
        yield functools.partial(_fail, problem)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo | str]:
    """The members; last the problem, where the tar does not end as it should.

    tarfile takes a cut between two members, and a damaged header, for the end.
    """
    file = cast(IO[bytes], tar.fileobj)
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
            yield member
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            yield f"tar damaged: no end mark at byte {tar.offset}, where it stops making sense"
    except _DAMAGE as error:
        yield f"tar damaged: {error} behind byte {tar.offset}"


def _load(tar: tarfile.TarFile, group: _Group) -> Record:
    if group.problem:
        raise Bad(group.problem)
    contents = group.contents or [_content(tar, member) for _, member in group.members]
    suffixes = [suffix for suffix, _ in group.members]
    return {"__key__": group.key, MEMBERS: list(zip(suffixes, contents, strict=True))}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = tar.extractfile(member)
        content = b"" if file is None else file.read()
    except _DAMAGE as error:
        raise Bad(f"tar damaged: {error} in a member") from None
    if len(content) != member.size:
        raise Bad(f"tar damaged: a member has {len(content)} of {member.size} bytes")
    return content


def _fail(problem: str) -> Record:
    raise Bad(problem)
