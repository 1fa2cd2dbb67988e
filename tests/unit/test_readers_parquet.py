"""Pictures and words in parquet: FineVision's and The Cauldron's conversations, OBELICS's documents."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_data import picture, read_all, write_pictures

from megavlm.data.sample import Picture, Turn
from megavlm.errors import DataError


def write(path: Path, rows: list[dict[str, Any]], rows_a_group: int = 3) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_a_group)
    return path


def cell(seed: int) -> dict[str, Any]:
    return {"bytes": picture(seed), "path": None}


def test_texts_without_tags_have_their_pictures_in_front(tmp_path: Path) -> None:
    rows = [
        {
            "images": [cell(k) for k in range(k % 3)],
            "texts": [{"user": f"{k}?", "assistant": f"{k}."}] * 2,
            "source": "s",
        }
        for k in range(40)
    ]
    samples, refusals = read_all(write(tmp_path / "0.parquet", rows, rows_a_group=25), "hf-parquet")
    assert refusals == []
    assert [sample.id for sample in samples] == [f"0.parquet:{k}" for k in range(40)]
    assert {sample.source for sample in samples} == {"s"}
    assert samples[38].turns[0] == Turn("user", "<image>\n<image>\n38?")
    assert samples[38].turns[1:] == (Turn("assistant", "38."), Turn("user", "38?"), Turn("assistant", "38."))
    assert samples[38].pictures == (Picture((picture(0),)), Picture((picture(1),)))
    assert samples[0].turns[0].text == "0?"


def test_conversations_with_tags_keep_them(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Look: <image>"}, {"from": "gpt", "value": "Yes."}]
    rows: list[dict[str, Any]] = [
        {"id": "a", "image": cell(0), "conversations": turns},
        {"id": "b", "image": None, "conversations": turns},
    ]
    samples, refusals = read_all(write(tmp_path / "0.parquet", rows), "hf-parquet")
    assert [sample.turns[0].text for sample in samples] == ["Look: <image>"]
    assert [(refusal.id, refusal.reason) for refusal in refusals] == [
        ("b@0.parquet:1", "tags and pictures disagree: 1 <image>, 0 pictures given")
    ]


def test_messages_with_pictures_in_another_column(tmp_path: Path) -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "A."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    path = write(tmp_path / "0.parquet", [{"images": [cell(0)], "messages": messages}])
    samples, _ = read_all(path, "hf-parquet")
    assert samples[0].turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A."))


def test_obelics_keeps_the_order_of_texts_and_pictures(tmp_path: Path) -> None:
    rows = [
        {"images": [None, picture(0), picture(1), None], "texts": [" One. ", None, None, "Two.\n"]},
        {"images": [b"broken", None, None], "texts": [None, "a", "b"]},
        {"images": [b"broken", None, picture(2)], "texts": [None, "a <image>", None]},
        {"images": [picture(3), b"broken", None, None], "texts": [None, None, "a", "b"]},
        {"images": [None, picture(4)], "texts": ["a"]},
        {"images": [None, picture(5)], "texts": ["a", None]},
    ]
    samples, refusals = read_all(write(tmp_path / "0.parquet", rows), "obelics")
    assert [sample.text for sample in samples] == ["One.<image><image>Two.", "<image>a\n\nb"]
    assert samples[0].pictures == (Picture((picture(0),)), Picture((picture(1),)))
    assert [refusal.reason.partition(" (")[0] for refusal in refusals] == [
        "no picture left: 1 x picture unusable",
        "tags and pictures disagree: the text says <image>",
        "left out of a document: 1 x picture unusable",
        "lists differ in length: 2 images, 1 texts",
        "nothing behind the only picture",
    ]
    assert [refusal.id for refusal in refusals][2] == "0.parquet:3/1"


def test_obelics_finds_the_files_of_urls(tmp_path: Path) -> None:
    url = "http://a.b/c%20d.png?x=1"
    stems = [hashlib.sha256(url.encode()).hexdigest() + ".png", hashlib.md5(url.encode()).hexdigest(), "a.b/c d.png"]
    for number, stem in enumerate(stems):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = write_pictures(folder, [stem])
        urls = [url, "http://gone/x.png", "http://../../1/x", "http://["]
        path = write(tmp_path / f"{number}.parquet", [{"images": [*urls, None], "texts": [None] * 4 + ["Text."]}])
        samples, refusals = read_all(path, "obelics", images=str(folder))
        assert samples[0].pictures == (Picture((files[stem],)),)
        expected = "left out of a document: 1 x path leaves the folder of pictures, 2 x picture missing"
        assert [refusal.reason for refusal in refusals] == [expected]


def test_a_document_keeps_its_first_pictures_and_all_its_text(tmp_path: Path) -> None:
    pictures = [picture(k) for k in range(9)]
    row = {
        "images": [item for data in pictures for item in (data, None)],
        "texts": [item for k in range(9) for item in (None, str(k))],
    }
    sample = read_all(write(tmp_path / "0.parquet", [row]), "obelics")[0][0]
    assert sample.text == "".join(f"<image>{k}" for k in range(6)) + "\n\n6\n\n7\n\n8"
    assert [item.files[0] for item in sample.pictures] == pictures[:6]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="is no parquet file"):
        read_all(path, "obelics")
    rows = [{"images": [cell(k)], "texts": [{"user": "q" * 100 + str(k), "assistant": "a"}]} for k in range(12)]
    write(path, rows)
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)  # the pages of the first row group
    path.write_bytes(data)
    samples, refusals = read_all(path, "hf-parquet")
    assert len(samples) + len(refusals) == 12
    assert [sample.turns[0].text[-1] for sample in samples][-3:] == ["9", "0", "1"]
    assert refusals
