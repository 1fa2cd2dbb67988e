"""What every reader shares: its options, how one record becomes samples, and what no sample may lack.

A container (a file of JSON, a tar, a parquet file) gives entries: cheap handles, in the order of the file, that load
one record when they are called. A converter makes samples of a loaded record. Whatever is wrong with a record raises
`Bad` on the way, and becomes a refusal here; only a file that can't be read at all raises a DataError.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megavlm.config import Config, require
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG, Refusal, Sample, Turn

MIB = 1 << 20
ID_FIELDS = ("id", "sample_id", "question_id", "questionId", "__key__", "key", "uid")
SOURCE_FIELDS = ("source", "data_source", "dataset")
MOST_TEXT_BYTES = 2 * MIB
"""Of one sample; escaped as JSON it may grow sixfold."""
_LONGEST_NAME = 200
_TAGS = re.compile(f"{IMAGE_TAG}|{VIDEO_TAG}")

Record = Mapping[str, Any]
Entry = Callable[[], Record]
"""Loads one record; raises `Bad` where it can't."""


class Bad(Exception):
    """A record that makes no sample: `category: detail`, the category being what refusals are counted by."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions(Config):
    """What a reader may take, and the rules of interleaved documents."""

    images: str | None = None
    """Folder that the names of pictures start from; by default the one that the file itself lies in."""
    dataset: str | None = None
    """Name of the data set, by which losses are told apart and prompts chosen; by default the file's or folder's."""
    annotations: str | None = None
    """VQA-style questions without answers: the file that has these, by `question_id`, as of VQAv2 and OK-VQA."""
    most_record_mib: int = 64
    """A larger record of json or of a tar is refused, before it is held in memory."""
    most_pictures: int = 1024
    """Pictures and frames of one record; with more it is refused."""
    most_pictures_mib: int = 256
    """All pictures of one record; where they are more it is refused."""
    most_document_pictures: int = 6
    """Pictures that an interleaved document keeps: the first of them (InfiMM's model card)."""
    least_similarity: float = 0.24
    """MMC4: a picture whose best sentence is less like it is left out (OpenFlamingo's script)."""
    least_picture_kb: int = 11
    """MMC4: smaller pictures, in whole kilobytes, are left out (OpenFlamingo drops those of at most 10)."""
    single_picture_share: float = 0.5
    """MMC4: the share of documents with one picture that are kept, chosen by their id (OpenFlamingo's half)."""

    def check(self) -> None:
        for name in (
            "most_record_mib",
            "most_pictures",
            "most_pictures_mib",
            "most_document_pictures",
        ):
            require(getattr(self, name) >= 1, self, name, "must be at least 1", "use a positive number")
        share = self.single_picture_share
        require(0 <= share <= 1, self, "single_picture_share", "is no share", "use a number from 0 to 1")


@dataclass
class Context:
    """What a converter knows beside the record, and what the record has taken."""

    options: ReadOptions
    folder: Path
    """Where the names of pictures start from."""
    dataset: str
    """Name of the data set, where the record has none."""
    pictures: int = 0
    picture_bytes: int = 0

    def start(self) -> None:
        """A new record begins."""
        self.pictures = self.picture_bytes = 0

    def take(self, size: int) -> None:
        """Another picture of so many bytes; a record that names one file a thousand times must not fill the memory."""
        self.pictures, self.picture_bytes = self.pictures + 1, self.picture_bytes + size
        if self.pictures > self.options.most_pictures:
            raise Bad(f"too many pictures: more than {self.options.most_pictures}")
        if self.picture_bytes > self.options.most_pictures_mib * MIB:
            raise Bad(f"pictures too large: more than {self.options.most_pictures_mib} MiB in one record")


@dataclass(frozen=True)
class Container:
    """A kind of file: its entries in order, and how many they are."""

    entries: Callable[[Path, ReadOptions], Iterator[Entry]]
    count: Callable[[Path, ReadOptions], int]
    suffixes: tuple[str, ...]


class Reader(NamedTuple):
    """A format: what holds its records, and what makes samples of one; ids and checks are added by `samples_of`."""

    summary: str
    container: Container
    convert: Callable[[Record, Context], Iterator[Sample | Refusal]]


def samples_of(reader: Reader, entry: Entry, place: str, context: Context) -> Iterator[Sample | Refusal]:
    """The samples of one entry, under ids that no other entry's have: `id@place`, or `place` alone.

    The place (file and number of the record) makes ids unique whatever the data says, with no memory of other ids:
    LLaVA's own files name many records by the same picture.
    """
    name = ""
    context.start()
    try:
        record = entry()
        name = _name_of(record)
        found = list(reader.convert(record, context))
        for index, item in enumerate(found):
            suffix = f"/{index}" if len(found) > 1 else ""
            yield _named(item, f"{name}@{place}{suffix}" if name else place + suffix, record, context)
    except Bad as bad:
        yield Refusal(f"{name}@{place}" if name else place, str(bad))


def _named(item: Sample | Refusal, full_id: str, record: Record, context: Context) -> Sample | Refusal:
    if isinstance(item, Refusal):
        return dataclasses.replace(item, id=full_id)
    try:
        source = context.options.dataset or _text_field(record, SOURCE_FIELDS) or context.dataset
        return checked(dataclasses.replace(item, id=full_id, source=source))
    except Bad as bad:
        return Refusal(full_id, str(bad))


def checked(sample: Sample) -> Sample:
    """The sample, if its tags and pictures agree, its text is text, and there is something to learn from it."""
    texts = [sample.text, *(turn.text for turn in sample.turns)]
    try:
        size = len("".join(texts).encode())
    except UnicodeEncodeError:
        raise Bad("text is not Unicode: it holds half of a surrogate pair") from None
    if size > MOST_TEXT_BYTES:
        raise Bad(f"text too long: {size} bytes")
    tags = [tag for text in texts for tag in _TAGS.findall(text)]
    kinds = [VIDEO_TAG if picture.is_video else IMAGE_TAG for picture in sample.pictures]
    if tags != kinds:
        raise Bad(f"tags and pictures disagree: {_counts(tags) or 'no tags'}, {len(kinds)} pictures given")
    if any(not picture.files for picture in sample.pictures):
        raise Bad("video without frames: its list of frames is empty")
    if sample.turns:
        _check_turns(sample.turns)
    elif not _says(sample.text):
        raise Bad("no text: nothing but tags and blanks")
    return sample


def _check_turns(turns: tuple[Turn, ...]) -> None:
    """A system message or none, then user and assistant in turn, and an answer that says something."""
    roles = [turn.role for turn in turns]
    rest = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(rest)):
        raise Bad(f"turns out of order: {' '.join(roles[:8])}")
    if not any(turn.role == "assistant" and _says(turn.text) for turn in turns):
        raise Bad("no answer: the assistant says nothing")


def text_of(value: Any, what: str) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise Bad(f"wrong type: {what} is {kind_of(value)}, not text")
    return value


def list_of(value: Any, what: str) -> list[Any]:
    """The value, if it is a list."""
    if not isinstance(value, list):
        raise Bad(f"wrong type: {what} is {kind_of(value)}, not a list")
    return value


def kind_of(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null", bytes: "bytes"}
    return names.get(type(value), "a number")


def untagged(text: str) -> str:
    """The text without its tags, and without the line break that follows one."""
    return re.sub(f"(?:{_TAGS.pattern})\n?", "", text)


def _says(text: str) -> bool:
    return bool(_TAGS.sub("", text).strip())


def _counts(tags: list[str]) -> str:
    return ", ".join(f"{count} {tag}" for tag, count in Counter(tags).items())


def _name_of(record: Record) -> str:
    for field in ID_FIELDS:
        value = record.get(field)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return printable(str(value))
    return ""


def _text_field(record: Record, fields: tuple[str, ...]) -> str:
    return next((printable(record[name]) for name in fields if isinstance(record.get(name), str)), "")


def printable(text: str) -> str:
    """The text as a name: not too long, nothing in it that a terminal would act on or UTF-8 can't hold."""
    return "".join(char if char.isprintable() else "?" for char in text.strip()[:_LONGEST_NAME])
