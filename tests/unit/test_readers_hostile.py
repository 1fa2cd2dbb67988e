"""Whatever a record holds, a reader answers with samples or refusals, and nothing else."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from foreign_data import llava_record, picture

from megavlm.data.readers.base import Context, ReadOptions, samples_of
from megavlm.data.readers.registry import READERS
from megavlm.data.readers.tar_files import MEMBERS
from megavlm.data.sample import Refusal, Sample

FIELDS = [
    *("id", "conversations", "messages", "texts", "image", "images", "video", "videos", "source", "question", "answer"),
    *("questions", "answers", "choices", "caption", "text_list", "image_info", "similarity_matrix", "url", "image_id"),
    *("from", "value", "role", "content", "user", "assistant", "type", "text", "image_url", "bytes", "path"),
    *("image_name", "image_base64", "correct_choice_idx", "frames"),
]
WORDS = [
    *("", "a", "<image>", "<video>", "human", "gpt", "user", "assistant", "../x", "/", "\0", "\ud800", "x.png"),
    *("data:,", "data:;base64,AA==", "file:///x", "http://[", "image", "text", "image_url"),
]


def something(generator: random.Random, depth: int = 0) -> Any:
    kind = generator.randrange(5 if depth > 3 else 8)
    if kind == 0:
        return generator.choice([None, True, 0, -1, 1.5, 10**400, float("nan")])
    if kind < 4:
        return generator.choice(WORDS)
    if kind == 4:
        return generator.choice([b"", b"\xff\xd8\xff", picture(1)])
    if kind == 5:
        return [something(generator, depth + 1) for _ in range(generator.randrange(4))]
    names = generator.sample(FIELDS, generator.randrange(1, 8))
    return {name: something(generator, depth + 1) for name in names}


def bent(generator: random.Random, value: Any) -> Any:
    """The value with something in it replaced."""
    if generator.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return something(generator)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = generator.choice(keys)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = bent(generator, value[key])
    return copy


GOOD: dict[str, Any] = {
    "llava": llava_record("x", "x.png"),
    "messages": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]},
                              {"role": "assistant", "content": "a"}]},
    "hf-parquet": {"images": [{"bytes": picture(0), "path": None}], "texts": [{"user": "q", "assistant": "a"}]},
    "infinity-mm": {MEMBERS: []},
    "img2dataset": {MEMBERS: []},
    "obelics": {"images": [picture(0), None], "texts": [None, "a"]},
    "mmc4": {"text_list": ["a", "b"], "image_info": [{"image_name": "x.png"}], "similarity_matrix": [[0.5, 0.1]]},
    "vqa": {"question": "q", "answers": [{"answer": "a"}], "choices": ["a", "b"], "image": "x.png"},
}  # fmt: skip


def tar_record(generator: random.Random) -> dict[str, Any]:
    """Members of a tar, the text in them bent."""
    words = json.dumps(bent(generator, llava_record("x", "x.png")), default=str).encode()
    members = [("json", words), ("a.json", words), ("txt", words), ("txt", b"\xff"), ("jpg", picture(0)), ("png", b"")]
    return {"__key__": generator.choice(WORDS), MEMBERS: generator.choices(members, k=generator.randrange(4))}


@pytest.mark.parametrize("name", READERS)
def test_no_record_makes_a_reader_raise(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.png").write_bytes(picture(0))
    generator = random.Random(name)
    context = Context(ReadOptions(least_picture_kb=0), tmp_path, "set")
    for _ in range(1500):
        record = tar_record(generator) if MEMBERS in GOOD[name] else bent(generator, GOOD[name])
        if not isinstance(record, dict):
            continue  # containers give nothing else
        found = list(samples_of(READERS[name], partial(dict, record), "file:0", context))
        assert found
        assert all(isinstance(item, (Sample, Refusal)) for item in found)
