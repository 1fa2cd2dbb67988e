"""Which format a file or a folder is in, by looking, and what is said where that does not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_data import llava_record, picture, write_json, write_lines, write_tar

from megavlm.data.readers.registry import READERS, detect, files_of
from megavlm.errors import DataError

TURN = [{"user": "q", "assistant": "a"}]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (llava_record("x"), "llava"),
        ({"messages": []}, "messages"),
        ({"text_list": [], "image_info": [], "similarity_matrix": []}, "mmc4"),
        ({"question": "q", "answers": []}, "vqa"),
        ({"caption": "c", "image": "a.png"}, "vqa"),
    ],
)
def test_json_is_known_by_its_fields(tmp_path: Path, record: dict[str, Any], name: str) -> None:
    assert detect(write_lines(tmp_path / "a.jsonl", [7, record, record])) == name
    assert detect(write_json(tmp_path / "b.json", [record])) == name


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"images": [{"bytes": b"", "path": ""}], "texts": TURN}, "hf-parquet"),
        ({"images": [b""], "texts": ["t"]}, "obelics"),
        ({"image": b"", "conversations": [{"from": "human", "value": "q"}]}, "hf-parquet"),
        ({"image": b"", "messages": [{"role": "user", "content": "q"}]}, "hf-parquet"),
    ],
)
def test_parquet_is_known_by_its_columns(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert detect(tmp_path / "a.parquet") == name


def test_tars_are_known_by_their_members(tmp_path: Path) -> None:
    caption = write_tar(tmp_path / "a.tar", [("0.jpg", picture(0)), ("0.txt", b"c"), ("0.json", b'{"url": "u"}')])
    assert detect(caption) == "img2dataset"
    assert (
        detect(write_tar(tmp_path / "b.tar", [("0.jpg", picture(0)), ("0.json", b'{"caption": "c"}')])) == "img2dataset"
    )
    talk = b'{"conversations": []}'
    assert detect(write_tar(tmp_path / "c.tar", [("0.txt", b"?"), ("1.json", talk), ("1.jpg", b"")])) == "infinity-mm"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.json", b'[{"words": 1}]', "holds records of words, which no reader knows"),
        ("a.json", b'[{"question": 1}, {"messages": []}]', "holds records of several formats: vqa, messages"),
        ("a.jsonl", b"\xff\n", "holds no record among its first 32"),
        ("a.csv", b"a,b", "has the suffix '.csv'"),
    ],
)
def test_what_no_reader_knows_is_named_with_all_formats(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        detect(tmp_path / name)
    assert found in str(raised.value)
    assert str(raised.value).endswith(" | ".join(READERS))


def test_unknown_parquet_and_tars_say_what_they_hold(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the columns a, b, which no reader knows"):
        detect(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds members cls, npy"):
        detect(write_tar(tmp_path / "a.tar", [("0.cls", b"1"), ("0.npy", b"2")]))


def test_folders_of_releases_as_they_are(tmp_path: Path) -> None:
    pairs = tmp_path / "laion"
    pairs.mkdir()
    for number in (1, 0):
        write_tar(pairs / f"0000{number}.tar", [("0.jpg", picture(0)), ("0.txt", b"c")])
        pq.write_table(pa.table({"url": ["u"]}), pairs / f"0000{number}.parquet")
        (pairs / f"0000{number}_stats.json").write_text("{}")
    assert [path.name for path in files_of(pairs, None)] == ["00000.tar", "00001.tar"]
    assert detect(pairs) == "img2dataset"
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    pq.write_table(pa.table({"images": [[b""]], "texts": [["t"]]}), hub / "train-0.parquet")
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    (tmp_path / "hub" / ".cache").mkdir()
    (tmp_path / "hub" / ".cache" / "x.json").write_text("{}")
    assert detect(tmp_path / "hub") == "obelics"


def test_stage_folders_are_infinity_mm(tmp_path: Path) -> None:
    for folder, members in (("stage1/a", [("0.jpg", picture(0)), ("0.txt", b"c")]), ("stage2/b/c", [])):
        (tmp_path / folder).mkdir(parents=True)
        write_tar(tmp_path / folder / "0.tar", members)
    assert detect(tmp_path) == "infinity-mm"


def test_a_folder_of_several_kinds_needs_a_format(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [llava_record("x")])
    write_tar(tmp_path / "images.tar", [("0.jpg", picture(0))])
    with pytest.raises(DataError, match="holds 1 .json/.jsonl/.ndjson, 1 .tar/.tar.gz/.tgz; which of them is meant"):
        detect(tmp_path)
    assert files_of(tmp_path, "llava") == [tmp_path / "a.json"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file of data"):
        detect(tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        detect(tmp_path / "gone")
