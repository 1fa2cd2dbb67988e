"""What the members of a tar's record are: pictures, texts, JSON."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from megavlm.data.readers.base import Bad, Context, Record
from megavlm.data.readers.pictures import SUFFIXES, checked_picture
from megavlm.data.readers.tar_files import MEMBERS
from megavlm.data.sample import Picture

TEXT_SUFFIXES = ("txt", "caption", "text")


class TarRecord(NamedTuple):
    """One record of a tar, its parts told apart by their suffixes."""

    key: str
    pictures: list[bytes]
    text: str | None
    data: Any
    """What its JSON says; None where it has none."""
    suffixes: tuple[str, ...]

    @property
    def found(self) -> str:
        """What is there, for a reader that looked for something else."""
        keys = f"; json with {', '.join(list(map(str, self.data))[:12])}" if isinstance(self.data, dict) else ""
        return f"members {', '.join(self.suffixes[:12]) or 'none'}{keys}"


def tar_record(record: Record) -> TarRecord:
    """The parts of a record; a suffix such as `0.jpg` or `image.png` counts by its end."""
    pictures: list[bytes] = []
    texts: list[bytes] = []
    jsons: list[bytes] = []
    members = record[MEMBERS]
    for suffix, content in members:
        last = suffix.rpartition(".")[2]
        if f".{last}" in SUFFIXES:
            pictures.append(content)
        elif last == "json":
            jsons.append(content)
        elif last in TEXT_SUFFIXES:
            texts.append(content)
    if len(jsons) > 1:
        raise Bad(f"two records under one name: {len(jsons)} json members")
    data = _parsed(jsons[0]) if jsons else None
    text = _decoded(texts[0]) if texts else None
    return TarRecord(record["__key__"], pictures, text, data, tuple(suffix for suffix, _ in members))


def pictures_of(record: TarRecord, context: Context) -> tuple[Picture, ...]:
    """Its pictures, in the order of the tar."""
    return tuple(Picture((checked_picture(data, record.key, context),)) for data in record.pictures)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(_decoded(content))
    except (ValueError, RecursionError) as error:
        raise Bad(f"no JSON: {getattr(error, 'msg', None) or type(error).__name__}") from None


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Bad("not UTF-8: a member does not decode") from None
