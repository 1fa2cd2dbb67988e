"""Large files of JSON, passed over value by value: the same records as json.load, whatever the size of the blocks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megavlm.data.readers import json_files
from megavlm.data.readers.base import Bad, ReadOptions
from megavlm.errors import DataError


def records(path: Path, **options: Any) -> list[Any]:
    """What the entries load, or the reason why they don't."""
    found: list[Any] = []
    for entry in json_files.entries(path, ReadOptions(**options)):
        try:
            found.append(entry())
        except Bad as bad:
            found.append(str(bad))
    return found


def random_value(generator: random.Random, depth: int = 0) -> Any:
    kind = generator.randrange(3 if depth > 3 else 5)
    if kind == 0:
        return "".join(generator.choice('ab"\\{}[],:\n\té😀') for _ in range(generator.randrange(12)))
    if kind == 1:
        return generator.choice([0, -1.5e9, 10**30, True, False, None])
    if kind == 2:
        return generator.choice(["", [], {}])
    items = [random_value(generator, depth + 1) for _ in range(generator.randrange(5))]
    return items if kind == 3 else {f'k{index}"{{': item for index, item in enumerate(items)}


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_gives_what_json_load_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_files, "_BLOCK", block)
    generator = random.Random(block)
    values = [{"value": random_value(generator)} for _ in range(60)]
    path = tmp_path / "set.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=generator.random() < 0.5), encoding="utf-8")
    assert records(path) == values
    assert json_files.count(path, ReadOptions()) == len(values)


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_an_object_gives_its_list_or_its_members_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(json_files, "_BLOCK", block)
    path = tmp_path / "set.json"
    listed = {"dataset": "x", "info": {"a": 1}, "images": [{"b": "]"}], "data": [{"q": 1}, {"q": 2}], "end": 3}
    path.write_text(json.dumps(listed))
    assert records(path) == [{"q": 1}, {"q": 2}]
    path.write_text(json.dumps({"007": {"q": 1}, '00"8': {"q": 2, "id": 5}}, indent=2))
    assert records(path) == [{"id": "007", "q": 1}, {"id": 5, "q": 2}]


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_what_is_no_object_is_refused_and_the_rest_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(json_files, "_BLOCK", block)
    path = tmp_path / "set.json"
    path.write_text('[{"a": 1}, 7, "x,]}", null, [1, 2], {"a" 2}, {"a": 3}]')
    assert records(path) == [
        {"a": 1},
        "wrong type: the record is a number, not an object",
        "wrong type: the record is text, not an object",
        "wrong type: the record is null, not an object",
        "wrong type: the record is a list, not an object",
        "no JSON: Expecting ':' delimiter",
        {"a": 3},
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("hello", "starts with b'h'"),
        ('[{"a": 1}', "breaks off"),
        ('[{"a": 1}, {"b": ', "breaks off within a record"),
        ('[{"a": "x', "breaks off within a record"),
        ('[{"a": 1} {"b": 2}]', "has b'{' where , or ] was expected"),
        ('[{"a": 1}] [', "goes on with b'['"),
        ('{"a": {"q": 1}, ', "has no name"),
        ('{"a" {"q": 1}}', "has no colon"),
        ("[1, 2", "breaks off within a value"),
    ],
)
def test_a_file_that_is_no_json_says_where(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "set.json"
    path.write_text(text)
    with pytest.raises(DataError, match="at byte") as raised:
        records(path)
    assert problem in str(raised.value)


def test_enormous_values_are_passed_over_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    more = json_files._Scanner._more

    def measured(scanner: Any) -> bool:
        found = more(scanner)
        kept.append(len(scanner._text))
        return found

    monkeypatch.setattr(json_files._Scanner, "_more", measured)
    path = tmp_path / "set.json"
    long = '"' + 'x\\"' * 3_000_000 + '"'
    many = "[" + ",".join(['{"a": "]"}'] * 900_000) + "]"
    values = ['{"a": 1}', f'{{"b": {long}}}', f'{{"c": {many}}}', long, "7" * 9_000_000, '{"a": 2}']
    path.write_text(f"[{', '.join(values)}]")
    too_large = "record too large: more than 1 MiB"
    assert records(path, most_record_mib=1) == [{"a": 1}, *[too_large] * 4, {"a": 2}]
    assert max(kept) < 6 << 20  # of 36 MB
