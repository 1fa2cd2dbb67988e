"""From a tar shard to its rows of the index: one pass over its bytes, members grouped to samples, each one checked.

Consecutive members whose names agree up to the first dot behind the last slash are a sample, as in WebDataset: one
`.json` with its words, and its picture files in their order; others are overlooked. What makes no sample gets no row
and is refused with a reason: a name that leads out of its folder, or comes again later, words and pictures that
disagree, a picture whose header tells no size. Where an archive breaks off, the samples before it count, save the last
one, which may lack members.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megavlm.data.headers import FORMATS, MOST_PICTURE_BYTES, read_header
from megavlm.data.pieces import OnProgress
from megavlm.data.sample_json import MOST_JSON_BYTES, decode_words
from megavlm.data.store import Store, is_plain, open_stream
from megavlm.data.tar_format import BLOCK, DamagedTar, Member, TarReader

SAMPLE_COLUMNS = {"json_block": "u4", "json_size": "u4", "json_crc": "u4", "first_picture": "u4"}
"""Columns with a row for each sample: where its JSON begins, in blocks of 512 bytes of its shard; its size and CRC-32;
its first picture row, counted from the first of its shard."""
PICTURE_COLUMNS = {
    "picture_block": "u4",
    "picture_size": "u4",
    "picture_crc": "u4",
    "width": "u4",
    "height": "u4",
    "kind": "u1",
}
"""Columns with a row for each picture file: the same of its bytes; its size in pixels as shown; its kind."""
COLUMNS = SAMPLE_COLUMNS | PICTURE_COLUMNS

KIND_FORMAT, KIND_VIDEO, KIND_FIRST = 0x0F, 0x10, 0x20
"""Parts of a kind: its place in FORMATS; whether it is a frame of a video; whether a picture begins with it."""

_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_PROGRESS_STEP = 256


@dataclass(frozen=True)
class ShardRows:
    """What the index holds of a shard."""

    name: str
    bytes: int
    sha256: str
    columns: dict[str, NDArray[np.generic]]
    refused: list[tuple[str, str]]
    """(id, reason) of what makes no sample."""
    damage: str | None
    """What is wrong with the archive; None where nothing is."""

    @property
    def samples(self) -> int:
        return len(self.columns["json_block"])

    @property
    def pictures(self) -> int:
        return len(self.columns["kind"])


@dataclass
class _Group:
    """The members of a sample so far."""

    key: str
    json: tuple[int, bytes] | None = None
    """Its block and its content."""
    pictures: list[tuple[int, ...]] = field(default_factory=list)
    """Their rows, kinds without their places among the others."""
    problem: str | None = None


class _Hashing:
    """A stream that hashes what is read from it."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self.sum, self.count = read, hashlib.sha256(), 0

    def read(self, size: int, /) -> bytes:
        data = self._read(size)
        self.sum.update(data)
        self.count += len(data)
        return data


def scan_shard(store: Store, name: str, progress: OnProgress = lambda new_bytes, new_samples: None) -> ShardRows:
    """The rows of a shard; DataError where it is missing or cannot be read."""
    size = store.size(name)
    stream = _Hashing(open_stream(store, name, size).read)
    scan, damage = _Scan(name), None
    done = (0, 0)
    try:
        reader = TarReader(stream, size)
        for member in reader:
            scan.take(member, reader)
            if scan.samples - done[1] >= _PROGRESS_STEP:
                progress(stream.count - done[0], scan.samples - done[1])
                done = (stream.count, scan.samples)
        scan.close_group()
        reader.finish()
    except DamagedTar as problem:
        damage = str(problem)
        scan.refuse_last("the archive breaks off within it or behind it")
        while stream.read(2**20):
            pass  # the sum is of all bytes
    progress(size - done[0], scan.samples - done[1])
    return ShardRows(name, size, stream.sum.hexdigest(), scan.columns(), scan.refused, damage)


class _Scan:
    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.refused: list[tuple[str, str]] = []
        self.samples = 0
        self._columns = {name: array("I" if kind == "u4" else "B") for name, kind in COLUMNS.items()}
        self._seen: set[str] = set()
        self._group: _Group | None = None

    def columns(self) -> dict[str, NDArray[np.generic]]:
        return {name: np.array(self._columns[name], dtype=kind) for name, kind in COLUMNS.items()}

    def take(self, member: Member, reader: TarReader) -> None:
        """Put a member to its sample."""
        folder, slash, file = member.name.rpartition("/")
        base, _, ending = file.partition(".")
        if not member.is_file or not base or not ending or (base.startswith("__") and base.endswith("__")):
            return  # folders, links, devices; hidden files and WebDataset's notes
        key = folder + slash + base
        if self._group is None or self._group.key != key:
            self.close_group()
            self._group = _Group(key)
            if not is_plain(key):
                self._group.problem = "its name leads out of its folder"
            elif key in self._seen:
                self._group.problem = "its name comes twice in its shard"
            self._seen.add(key)
        if self._group.problem is None:
            try:
                self._put(self._group, ending.lower(), member, reader)
            except DamagedTar:
                raise
            except ValueError as reason:
                self._group.problem = str(reason)

    def close_group(self) -> None:
        """Turn the members so far into rows, or refuse them."""
        group, self._group = self._group, None
        if group is None:
            return
        try:
            if group.problem is not None:
                raise ValueError(group.problem)
            self._append(group)
        except ValueError as reason:
            self.refused.append((f"{self.shard}/{group.key}", str(reason)))

    def refuse_last(self, reason: str) -> None:
        """Refuse the members so far."""
        if self._group is not None:
            self._group.problem = reason
        self.close_group()

    def _put(self, group: _Group, ending: str, member: Member, reader: TarReader) -> None:
        block = member.offset // BLOCK
        if block >= 2**32:
            raise ValueError("it lies beyond the first 2 TiB of its shard")
        if ending == "json":
            if group.json is not None:
                raise ValueError("it has several .json members")
            if member.size > MOST_JSON_BYTES:
                raise ValueError("its text is too long")
            group.json = (block, reader.read(member))
        elif ending.rpartition(".")[2] in _ENDINGS:
            if member.size > MOST_PICTURE_BYTES:
                raise ValueError("a picture file is too large")
            data = reader.read(member)
            header = read_header(data)
            kind = FORMATS.index(header.format)
            group.pictures.append((block, len(data), zlib.crc32(data), header.width, header.height, kind))

    def _append(self, group: _Group) -> None:
        if group.json is None:
            raise ValueError("it has no .json member")
        block, data = group.json
        words = decode_words(data, self.shard)
        sample = words.with_files([b""] * len(group.pictures))
        kinds = [
            (KIND_VIDEO if picture.is_video else 0) | (0 if place else KIND_FIRST)
            for picture in sample.pictures
            for place in range(len(picture.files))
        ]
        row = (block, len(data), zlib.crc32(data), len(self._columns["kind"]))
        for name, value in zip(SAMPLE_COLUMNS, row, strict=True):
            self._columns[name].append(value)
        for picture, kind in zip(group.pictures, kinds, strict=True):
            for name, value in zip(PICTURE_COLUMNS, (*picture[:-1], picture[-1] | kind), strict=True):
                self._columns[name].append(value)
        self.samples += 1
