"""The side index of a dataset: where each sample and each of its pictures lies, their checksums and sizes in pixels.

Beside its shards a dataset has `dataset.json` (counts, the size and SHA-256 of each shard, the format's version) and a
folder `index` with a file of little-endian numbers for each column (see `scan.COLUMNS`). The columns are mapped into
memory, shared by all processes of a node, and read where they are asked for: opening takes the same time for any number
of samples. Token counts for a tokenizer and template lie in `index/tokens/<name>`, two columns more; an image sample
costs 45 bytes with one set of them. Shards and index may lie apart, as where the shards are in an object store.

A sample's number is its place in the dataset: shards in the order of their names, samples in that of their members.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megavlm.data.headers import FORMATS
from megavlm.data.scan import COLUMNS, KIND_FIRST, KIND_FORMAT, KIND_VIDEO, SAMPLE_COLUMNS
from megavlm.data.store import is_plain
from megavlm.data.tar_format import BLOCK
from megavlm.errors import DataError

Ints = NDArray[np.int64]

FORMAT, VERSION = "megavlm dataset", 1
DATASET_FILE, INDEX_FOLDER, TOKENS_FOLDER, REFUSED_FILE = "dataset.json", "index", "tokens", "refused.jsonl"
TOKEN_COLUMNS = ("tokens", "targets")
ABOUT_FILE = "about.json"

_MOST_RESIDENT = 2**30
"""Bytes of the columns that a process seems to hold before it lets them go; nothing of them is its own."""
_TOUCHED_AT_ONCE = 64 * 1024
"""Bytes that Linux maps around each one that is touched, where they are in its cache."""


@dataclass(frozen=True)
class IndexReport:
    """What was indexed, and what was not."""

    samples: int
    pictures: int
    """Picture files."""
    bytes: int
    """Of all shards."""
    refused: dict[str, int]
    """Kind of reason -> how many; ids and whole reasons are in `index/refused.jsonl`."""
    damaged: dict[str, str]
    """Shard -> what is wrong with the archive."""


class Pictures(NamedTuple):
    """The picture files of several samples, one sample after another: row i belongs to the sample s with
    offsets[s] <= i < offsets[s + 1]."""

    offsets: Ints
    width: Ints
    height: Ints
    """Pixels, as shown."""
    is_video: NDArray[np.bool_]
    """Whether the file is a frame of a video."""
    is_first: NDArray[np.bool_]
    """Whether a picture begins with the file: always for images, and for the first frame of a video."""
    format: NDArray[np.uint8]
    """Place in headers.FORMATS."""


class Places(NamedTuple):
    """Where bytes lie: one row for each member."""

    offset: Ints
    """In the shard."""
    size: Ints
    crc: Ints
    """CRC-32."""


class SampleRows(NamedTuple):
    """What is needed to read several samples."""

    shard: Ints
    words: Places
    """The JSON members."""
    offsets: Ints
    """Sample s has the files offsets[s] to offsets[s + 1]."""
    files: Places


class TokenCounts(NamedTuple):
    """Per sample, for one tokenizer and template."""

    tokens: NDArray[np.uint32]
    """0 where the sample cannot be read."""
    targets: NDArray[np.uint32]
    """How many of them are trained on."""


class Index:
    """The index of a dataset; made by `open`."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self._maps: list[mmap.mmap] = []
        self._touched = dict.fromkeys(COLUMNS, 0)
        counts = {name: about["samples" if name in SAMPLE_COLUMNS else "pictures"] for name in COLUMNS}
        self.columns = {
            name: self._map(folder / INDEX_FOLDER / f"{name}.bin", kind, counts[name]) for name, kind in COLUMNS.items()
        }
        self.plan: dict[str, Any] | None = about.get("plan")
        """What the dataset was prepared from, where it was prepared here."""
        self._about = about
        shards = about["shards"]
        self.shard_names: list[str] = [shard["name"] for shard in shards]
        self.first_sample = _running_sum([shard["samples"] for shard in shards])
        """[shards + 1]: the number of each shard's first sample, and that of all."""
        self.first_picture = _running_sum([shard["pictures"] for shard in shards])
        """[shards + 1]: the row of each shard's first picture file, and the number of all."""

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """The index in a local folder; DataError where there is none, or one that does not hold together."""
        folder = Path(folder)
        return cls(folder, _read_about(folder))

    def __len__(self) -> int:
        return int(self.first_sample[-1])

    @property
    def report(self) -> IndexReport:
        """What was indexed, and what was not."""
        about = self._about
        return IndexReport(about["samples"], about["pictures"], about["bytes"], about["refused"], about["damaged"])

    @property
    def shard_bytes(self) -> dict[str, int]:
        """Name -> size of each shard."""
        return {shard["name"]: shard["bytes"] for shard in self._about["shards"]}

    @property
    def shard_sums(self) -> dict[str, str]:
        """Name -> SHA-256 of each shard."""
        return {shard["name"]: shard["sha256"] for shard in self._about["shards"]}

    @property
    def content_hash(self) -> str:
        """Tells whether two indexes describe the same samples, all their bytes included."""
        return content_hash(self._about)

    def shards_of(self, samples: ArrayLike) -> Ints:
        """The place in `shard_names` of each sample's shard."""
        numbers = np.asarray(samples, dtype=np.int64)
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise IndexError(f"sample {numbers.min()} or {numbers.max()} of {len(self)}")
        return np.searchsorted(self.first_sample, numbers, side="right").astype(np.int64) - 1

    def json_offsets(self, shard: int) -> Ints:
        """Where the JSON members of a shard's samples lie in it."""
        numbers = np.arange(self.first_sample[shard], self.first_sample[shard + 1])
        return self._places("json", numbers).offset

    def rows(self, samples: ArrayLike) -> SampleRows:
        """What is needed to read these samples."""
        numbers = np.asarray(samples, dtype=np.int64)
        shards = self.shards_of(numbers)
        offsets, files = self._picture_rows(numbers, shards)
        return SampleRows(shards, self._places("json", numbers), offsets, self._places("picture", files))

    def pictures(self, samples: ArrayLike) -> Pictures:
        """The sizes of these samples' pictures."""
        numbers = np.asarray(samples, dtype=np.int64)
        offsets, rows = self._picture_rows(numbers, self.shards_of(numbers))
        kind = self._take("kind", rows)
        return Pictures(
            offsets=offsets,
            width=self._take("width", rows).astype(np.int64),
            height=self._take("height", rows).astype(np.int64),
            is_video=kind & KIND_VIDEO != 0,
            is_first=kind & KIND_FIRST != 0,
            format=(kind & KIND_FORMAT).astype(np.uint8),
        )

    def token_counts(self, name: str, hash: str, options: str = "--tokenizer ...") -> TokenCounts:
        """The counts of that name; DataError where there are none, or of another tokenizer, template or index.

        `options`: those of `megavlm data index` that make them, for errors to name.
        """
        folder = tokens_folder(self.folder, name)
        remedy = f"run `megavlm data index {shlex.quote(str(self.folder))} {options}`"
        try:
            about = json.loads((folder / ABOUT_FILE).read_text())
            found = about["hash"], about["dataset"]
        except FileNotFoundError:
            raise DataError("token counts", name, f"are not in the index ({self._said_counts()})", remedy) from None
        except (ValueError, TypeError, KeyError):
            raise DataError("token counts", str(folder), "are damaged", remedy) from None
        if found[0] != hash:
            problem = f"were made with another tokenizer or template: {found[0]} instead of {hash}"
            raise DataError("token counts", name, problem, remedy)
        if found[1] != self.content_hash:
            raise DataError("token counts", name, "were made for other samples", remedy)
        return TokenCounts(*(self._map(folder / f"{column}.bin", "u4", len(self)) for column in TOKEN_COLUMNS))

    def token_sets(self) -> dict[str, dict[str, Any]]:
        """Name -> what is said of them, for all token counts of these samples."""
        found = {}
        for path in sorted((self.folder / INDEX_FOLDER / TOKENS_FOLDER).glob(f"[!.]*/{ABOUT_FILE}")):
            try:
                about = json.loads(path.read_text())
                is_of_these = about["dataset"] == self.content_hash and isinstance(about["hash"], str)
            except (OSError, ValueError, TypeError, KeyError):
                continue
            if is_of_these:
                found[path.parent.name] = about
        return found

    def _said_counts(self) -> str:
        return f"it has {', '.join(self.token_sets()) or 'none'}"

    def verify(self) -> None:
        """Read the columns whole and compare their checksums; DataError where one differs."""
        for name, expected in self._about["columns"].items():
            with (self.folder / INDEX_FOLDER / f"{name}.bin").open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise _damaged(self.folder, f"its column {name} differs from its checksum")

    def _picture_rows(self, samples: Ints, shards: Ints) -> tuple[Ints, Ints]:
        """(offsets, rows): the rows of each sample's picture files, one sample after another."""
        base = self.first_picture[shards]
        first = base + self._take("first_picture", samples)
        is_last = samples + 1 == self.first_sample[shards + 1]
        following = base + self._take("first_picture", np.where(is_last, samples, samples + 1))
        counts = np.where(is_last, self.first_picture[shards + 1], following) - first
        if (counts < 0).any() or (first + counts > self.first_picture[-1]).any():
            raise _damaged(self.folder, "a sample's picture rows make no sense")
        offsets = _running_sum(counts)
        return offsets, np.repeat(first - offsets[:-1], counts) + np.arange(offsets[-1])

    def _places(self, member: str, rows: Ints) -> Places:
        return Places(
            offset=self._take(f"{member}_block", rows).astype(np.int64) * BLOCK,
            size=self._take(f"{member}_size", rows).astype(np.int64),
            crc=self._take(f"{member}_crc", rows).astype(np.int64),
        )

    def _take(self, name: str, rows: Ints) -> NDArray[Any]:
        self._touched[name] = min(self._touched[name] + len(rows) * _TOUCHED_AT_ONCE, self.columns[name].nbytes)
        if sum(self._touched.values()) > _MOST_RESIDENT:
            # They stay in the cache of the system, and come back by themselves.
            self._touched = dict.fromkeys(COLUMNS, 0)
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
        return self.columns[name][rows]

    def _map(self, path: Path, kind: str, count: int) -> NDArray[Any]:
        dtype = np.dtype(kind).newbyteorder("<")
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != count * dtype.itemsize:
                    problem = f"{path.name} has {size} bytes instead of {count * dtype.itemsize}"
                    raise _damaged(self.folder, problem)
                if not count:
                    return np.zeros(0, dtype)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _damaged(self.folder, f"{path.name} cannot be read: {error.strerror}") from None
        self._maps.append(mapped)
        return np.frombuffer(mapped, dtype)


def content_hash(about: dict[str, Any]) -> str:
    """Of the contents of a `dataset.json`."""
    return hashlib.sha256(json.dumps(about["columns"], sort_keys=True).encode()).hexdigest()


def tokens_folder(folder: Path, name: str) -> Path:
    """Where the token counts of that name lie in a dataset's folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise DataError("token counts", name, "is no name", "use letters, digits, dots and dashes")
    return folder / INDEX_FOLDER / TOKENS_FOLDER / name


def format_names(codes: NDArray[np.uint8]) -> list[str]:
    """The formats of pictures, as endings of files."""
    return [FORMATS[code] for code in codes]


def _running_sum(counts: ArrayLike) -> Ints:
    numbers = np.asarray(counts, dtype=np.int64)
    sums = np.zeros(len(numbers) + 1, dtype=np.int64)
    np.cumsum(numbers, out=sums[1:])
    return sums


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / DATASET_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():
            raise DataError("dataset", str(folder), "is no folder", "check the path") from None
        problem = f"holds no {DATASET_FILE}"
        raise DataError("dataset", str(folder), problem, f"run `megavlm data index {folder}`") from None
    except (OSError, ValueError, RecursionError):
        raise _damaged(folder, f"its {DATASET_FILE} cannot be read") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise _damaged(folder, f"its {DATASET_FILE} is of another kind")
    if about.get("version") != VERSION:
        problem = f"is of version {about.get('version')} of the format; this program reads {VERSION}"
        raise DataError("dataset", str(folder), problem, f"run `megavlm data index {folder}`")
    if not _holds_together(about):
        raise _damaged(folder, f"its {DATASET_FILE} contradicts itself")
    return about


def _holds_together(about: dict[str, Any]) -> bool:
    try:
        shards = about["shards"]
        names = [shard["name"] for shard in shards]
        sums = {key: [shard[key] for shard in shards] for key in ("samples", "pictures", "bytes")}
        numbers_fit = all(
            all(type(count) is int and count >= 0 for count in counts) and sum(counts) == about[key]
            for key, counts in sums.items()
        )
        dictionaries = all(isinstance(about[key], dict) for key in ("refused", "damaged", "columns"))
        return numbers_fit and dictionaries and set(about["columns"]) == set(COLUMNS) and all(map(is_plain, names))
    except (KeyError, TypeError):
        return False


def _damaged(folder: Path, problem: str) -> DataError:
    return DataError("index", str(folder), f"is damaged: {problem}", f"run `megavlm data index {folder}` again")
