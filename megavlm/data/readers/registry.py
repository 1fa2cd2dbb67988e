"""The formats by name, and which of them a file or folder is in, by looking inside."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from megavlm.data.readers.base import Bad, Context, Reader, ReadOptions, samples_of
from megavlm.data.readers.conversation import FIELDS
from megavlm.data.readers.hf_parquet import HF_PARQUET
from megavlm.data.readers.img2dataset import CAPTION_FIELDS, IMG2DATASET
from megavlm.data.readers.infinity_mm import INFINITY_MM
from megavlm.data.readers.json_files import JSON
from megavlm.data.readers.llava import LLAVA
from megavlm.data.readers.messages import MESSAGES
from megavlm.data.readers.mmc4 import MMC4
from megavlm.data.readers.obelics import OBELICS
from megavlm.data.readers.parquet_files import PARQUET, opened
from megavlm.data.readers.tar_files import TAR
from megavlm.data.readers.tar_records import tar_record
from megavlm.data.readers.vqa import CAPTIONS, QUESTIONS, VQA
from megavlm.data.sample import Refusal, Sample
from megavlm.errors import DataError

READERS: dict[str, Reader] = {
    "llava": LLAVA,
    "messages": MESSAGES,
    "hf-parquet": HF_PARQUET,
    "infinity-mm": INFINITY_MM,
    "img2dataset": IMG2DATASET,
    "obelics": OBELICS,
    "mmc4": MMC4,
    "vqa": VQA,
}
RECORDS_LOOKED_AT = 32
STAGE_FOLDERS = {"stage1", "stage2", "stage3", "stage4"}
"""Infinity-MM's: its captions may look like img2dataset's pairs, and the stages behind them do not."""
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
"""Files that Hugging Face's libraries put beside data."""


def read(path: Path, name: str, options: ReadOptions) -> Iterator[Sample | Refusal]:
    """The samples and refusals of one file in the named format, in the order of the file."""
    reader = READERS[name]
    folder = Path(options.images) if options.images is not None else path.parent
    context = Context(options, folder, path.stem)
    for number, entry in enumerate(reader.container.entries(path, options)):
        yield from samples_of(reader, entry, f"{path.name}:{number}", context)


def files_of(source: Path, name: str | None) -> list[Path]:
    """The files of data in a folder, sorted; the file itself, if it is one. Dot files are passed over."""
    if not source.is_dir():
        if not source.exists():
            raise DataError("source", str(source), "does not exist", "check the path")
        return [source]
    containers = (JSON, PARQUET, TAR) if name is None else (READERS[name].container,)
    found = {container.suffixes: list[Path]() for container in containers}
    for path in _walk(source):
        for suffixes in found:
            if path.name.lower().endswith(suffixes) and path.name not in NO_DATA:
                found[suffixes].append(path)
    if found.get(TAR.suffixes):
        _drop_beside_tars(found)
    kinds = [suffixes for suffixes in found if found[suffixes]]
    if len(kinds) != 1:
        what = ", ".join(f"{len(found[kind])} {'/'.join(kind)}" for kind in kinds) or "no file of data"
        problem = f"holds {what}" + ("; which of them is meant is unclear" if kinds else "")
        raise DataError("source", str(source), problem, _remedy())
    return found[kinds[0]]


def detect(path: Path) -> str:
    """The format of a file, or of the first file of a folder; a DataError says what was found, where none fits."""
    file = files_of(path, None)[0]
    lower = file.name.lower()
    if lower.endswith(PARQUET.suffixes):
        return _parquet_format(file)
    if lower.endswith(TAR.suffixes):
        return _tar_format(file)
    if lower.endswith(JSON.suffixes):
        return _json_format(file)
    raise DataError("source", str(file), f"has the suffix {file.suffix!r}, which no reader knows", _remedy())


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def _drop_beside_tars(found: dict[tuple[str, ...], list[Path]]) -> None:
    """Pass over what img2dataset puts beside each tar: NAME.parquet with its metadata, NAME_stats.json."""
    tars = {path.with_name(path.name.partition(".")[0]) for path in found[TAR.suffixes]}
    for container in (JSON, PARQUET):
        if container.suffixes in found:
            found[container.suffixes] = [
                path
                for path in found[container.suffixes]
                if path.with_name(path.name.partition(".")[0].removesuffix("_stats")) not in tars
            ]


def _json_format(path: Path) -> str:
    found: dict[str, list[str]] = {}
    for record in _first_records(JSON.entries(path, ReadOptions())):
        name = json_format_of(record)
        found.setdefault(name or "", []).append(", ".join(list(record)[:12]))
    found.pop("", None) if len(found) > 1 else None
    if len(found) == 1 and "" not in found:
        return next(iter(found))
    if not found:
        problem = f"holds no record among its first {RECORDS_LOOKED_AT} that could be read"
    elif "" in found:
        problem = f"holds records of {found[''][0]}, which no reader knows"
    else:
        problem = f"holds records of several formats: {', '.join(found)}"
    raise DataError("source", str(path), problem, _remedy())


def json_format_of(record: Mapping[str, Any]) -> str | None:
    """The format that the fields of one record speak of."""
    if {"text_list", "image_info"} <= record.keys():
        return "mmc4"
    if isinstance(record.get("conversations"), list):
        return "llava"
    if isinstance(record.get("messages"), list):
        return "messages"
    if any(name in record for name in (*QUESTIONS, *CAPTIONS)):
        return "vqa"
    return None


def _parquet_format(path: Path) -> str:
    with opened(path) as file:
        schema = file.schema_arrow
    names = set(schema.names)
    texts = schema.field("texts").type if {"images", "texts"} <= names else pa.null()
    if pa.types.is_list(texts) or pa.types.is_large_list(texts):
        inner = texts.value_type
        return "obelics" if pa.types.is_string(inner) or pa.types.is_large_string(inner) else "hf-parquet"
    if names & set(FIELDS) - {"texts"}:
        return "hf-parquet"
    problem = f"has the columns {', '.join(schema.names[:12])}, which no reader knows"
    raise DataError("source", str(path), problem, _remedy())


def _tar_format(path: Path) -> str:
    described = "nothing that could be read"
    for record in _first_records(TAR.entries(path, ReadOptions())):
        try:
            parts = tar_record(record)
        except Bad as bad:
            described = str(bad)
            continue
        data = parts.data[0] if isinstance(parts.data, list) and parts.data else parts.data
        described = parts.found
        if isinstance(data, dict) and any(isinstance(data.get(name), list) for name in FIELDS):
            return "infinity-mm"
        has_caption = isinstance(data, dict) and any(isinstance(data.get(name), str) for name in CAPTION_FIELDS)
        if parts.pictures and (parts.text is not None or has_caption):
            return "infinity-mm" if STAGE_FOLDERS & set(path.parts) else "img2dataset"
    raise DataError("source", str(path), f"holds {described}, which no reader knows", _remedy())


def _first_records(entries: Iterator[Any]) -> Iterator[Mapping[str, Any]]:
    for entry in itertools.islice(entries, RECORDS_LOOKED_AT):
        try:
            yield entry()
        except Bad:
            continue


def _remedy() -> str:
    return f"name the files and say --format {' | '.join(READERS)}"
