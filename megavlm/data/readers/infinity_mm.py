"""Infinity-MM's release: tars under stage1/*/* to stage4/*/*/*.

The inner layout is not documented. Public code that reads the unpacked release finds a json in LLaVA's form for each
sample and its picture under the same name; so a json member with a conversation takes the pictures of its own record,
in the order of the tar, whatever file names it says. A picture with nothing but a text is a pair.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.data.readers.base import Bad, Context, Reader, Record, kind_of
from megavlm.data.readers.conversation import FIELDS, conversation, in_order
from megavlm.data.readers.img2dataset import CAPTION_FIELDS, pair_of
from megavlm.data.readers.tar_files import TAR
from megavlm.data.readers.tar_records import TarRecord, pictures_of, tar_record
from megavlm.data.sample import Refusal, Sample

PICTURE_FIELDS = ("image", "images", "video", "videos")


def _samples(record: Record, context: Context) -> Iterator[Sample | Refusal]:
    parts = tar_record(record)
    records = parts.data if isinstance(parts.data, list) else [parts.data]
    if len(records) > 1 and parts.pictures:
        raise Bad(f"layout unknown: a json of {len(records)} records beside {len(parts.pictures)} pictures")
    for data in records:
        if data is None or (isinstance(data, dict) and not any(data.get(name) is not None for name in FIELDS)):
            yield _pair(parts, data, context)
        elif isinstance(data, dict):
            yield from _conversation(parts, data, context)
        else:
            raise Bad(f"wrong type: a record is {kind_of(data)}, not an object; {parts.found}")


def _conversation(parts: TarRecord, data: Record, context: Context) -> Iterator[Sample]:
    named = [name for name in PICTURE_FIELDS if data.get(name)]
    if named and not parts.pictures:
        raise Bad(f"picture missing: the json has {named[0]}, and {parts.found}")
    bare = {name: value for name, value in data.items() if name not in PICTURE_FIELDS}
    for sample in conversation(bare, context):
        pictures = in_order(list(sample.turns), list(pictures_of(parts, context)), [])
        yield Sample("", (*sample.pictures, *pictures), sample.turns)


def _pair(parts: TarRecord, data: Record | None, context: Context) -> Sample:
    if parts.text is None and (data is None or not any(isinstance(data.get(name), str) for name in CAPTION_FIELDS)):
        raise Bad(f"layout unknown: {parts.found}")
    return pair_of(parts, context)


INFINITY_MM = Reader("Infinity-MM's tars: a json in LLaVA's form, its pictures under the same name", TAR, _samples)
