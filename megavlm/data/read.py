"""Reading samples by their numbers: the bytes that are asked for, from wherever they lie, each checksum verified.

Whatever is wrong with a sample ends in a DataError that names it, and leaves all others readable: a shard that is
missing or cut, a checksum that differs, a store that does not answer. Nothing is ever written.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from megavlm.data.headers import MOST_PICTURE_BYTES
from megavlm.data.index import Index, Ints, Places
from megavlm.data.sample import Sample
from megavlm.data.sample_json import MOST_JSON_BYTES, decode_words
from megavlm.data.store import FIRST_WAIT, TRIES, open_store
from megavlm.errors import DataError

WIDEST_GAP = 64 * 1024
"""Members of a sample that are no further apart are read at once: a second read costs more than so many bytes."""


class _Member(NamedTuple):
    """A member of a shard, and what the index says of it."""

    name: str
    """For errors."""
    most: int
    """Bytes that it may have."""
    offset: int
    size: int
    crc: int


class _Row(NamedTuple):
    """What is needed to read a sample."""

    sample: int
    shard: str
    words: _Member
    files: list[_Member]


class ShardReader:
    """The samples of a dataset whose index is open; many threads may use one reader."""

    def __init__(self, folder: str | Path, index: Index, tries: int = TRIES, first_wait: float = FIRST_WAIT) -> None:
        """`folder` holds the shards: local, or the URL of an object store. The last two are of remote reads."""
        self.index = index
        self._store = open_store(folder, tries, first_wait)

    def read(self, sample: int) -> Sample:
        """A sample with all its pictures."""
        return self._read(self._rows([sample])[0])

    def read_text(self, sample: int) -> Sample:
        """A sample without the bytes of its pictures: its picture files are empty."""
        row = self._rows([sample])[0]
        (words,) = self._contents(row, [row.words])
        return self._sample(row, words, [b""] * len(row.files))

    def read_pictures(self, sample: int, which: Sequence[int] | None = None) -> list[bytes]:
        """The picture files of a sample, or those of these places among them; nothing else is read."""
        row = self._rows([sample])[0]
        chosen = range(len(row.files)) if which is None else which
        if any(not 0 <= place < len(row.files) for place in chosen):
            raise IndexError(f"picture files {list(chosen)} of {len(row.files)}")
        return self._contents(row, [row.files[place] for place in chosen])

    def read_many(self, samples: Sequence[int] | Ints, threads: int = 8) -> list[Sample | DataError]:
        """Several samples in their order; in the place of one that cannot be read stands what is wrong with it."""
        try:
            rows: Sequence[_Row | int] = self._rows(samples)
        except DataError:  # the index is damaged somewhere
            rows = [int(sample) for sample in samples]
        with ThreadPoolExecutor(max(1, threads)) as pool:
            return list(pool.map(self._sample_or_error, rows))

    def _sample_or_error(self, row: _Row | int) -> Sample | DataError:
        try:
            return self.read(row) if isinstance(row, int) else self._read(row)
        except DataError as error:
            return error

    def _read(self, row: _Row) -> Sample:
        words, *files = self._contents(row, [row.words, *row.files])
        return self._sample(row, words, files)

    def _rows(self, samples: Sequence[int] | Ints) -> list[_Row]:
        rows = self.index.rows(samples)
        words = [_Member("text", MOST_JSON_BYTES, *place) for place in _tuples(rows.words)]
        places, ends = _tuples(rows.files), rows.offsets.tolist()
        found = []
        for number, (sample, shard) in enumerate(zip(samples, rows.shard.tolist(), strict=True)):
            files = [
                _Member(f"picture file {file}", MOST_PICTURE_BYTES, *place)
                for file, place in enumerate(places[ends[number] : ends[number + 1]])
            ]
            found.append(_Row(int(sample), self.index.shard_names[shard], words[number], files))
        return found

    def _sample(self, row: _Row, words: bytes, files: list[bytes]) -> Sample:
        try:
            return decode_words(words, f"{row.shard}@{row.words.offset}").with_files(files)
        except ValueError as reason:  # understood when the index was made: the index is of something else
            raise self._error(row, str(reason)) from None

    def _contents(self, row: _Row, members: Sequence[_Member]) -> list[bytes]:
        """The contents of members of a sample, in their order."""
        for member in members:
            if member.size > member.most:  # before anything of that size is allocated
                raise self._error(row, f"the index gives its {member.name} an impossible size")
        found = {}
        for group in _together(members):
            start, end = group[0].offset, group[-1].offset + group[-1].size
            try:
                data = self._store.read(row.shard, start, end - start)
            except DataError as error:
                raise self._error(row, f"the shard {error.problem}") from None
            for member in group:
                content = data[member.offset - start : member.offset - start + member.size]
                if zlib.crc32(content) != member.crc:
                    raise self._error(row, f"the checksum of its {member.name} differs")
                found[member.name] = content
        return [found[member.name] for member in members]

    def _error(self, row: _Row, problem: str) -> DataError:
        place = f"{self._store.folder}/{row.shard}"
        remedy = "copy the shard again; `megavlm data lint` names all such samples"
        return DataError(f"sample {row.sample}", place, problem, remedy)


def _tuples(places: Places) -> list[tuple[int, int, int]]:
    return list(zip(places.offset.tolist(), places.size.tolist(), places.crc.tolist(), strict=True))


def _together(members: Sequence[_Member]) -> list[list[_Member]]:
    """Members in groups that are read at once, each in the order of its offsets; no two of a group overlap."""
    groups: list[list[_Member]] = []
    end = 0
    for member in sorted(members, key=lambda member: member.offset):
        if groups and end <= member.offset <= end + WIDEST_GAP:
            groups[-1].append(member)
        else:
            groups.append([member])
        end = member.offset + member.size
    return groups
