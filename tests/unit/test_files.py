"""Lines of a file from its end, and where a run that goes on cuts its logs."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest

from megavlm.data import files
from megavlm.data.files import lines_from_end, numbered_line, where_to_cut


def number_of(_: int, line: bytes) -> int | None:
    found = numbered_line(line, "step")
    return None if found is None else int(found["step"])


def write_lines(path: Path, steps: int, tail: bytes = b"") -> list[int]:
    """Lines of unequal length, and where each ends."""
    lines = [json.dumps({"step": step, "text": "x" * (step * 7 % 40)}).encode() + b"\n" for step in range(steps)]
    path.write_bytes(b"".join(lines) + tail)
    return [sum(map(len, lines[:count])) for count in range(steps + 1)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 1 << 20])
def test_lines_from_the_end_are_those_from_the_beginning(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "AT_ONCE", at_once)
    draw = random.Random(at_once)
    cases = [b"", b"\n", b"\n\n", b"a", b"a\n", b"\na", b"ab\n\ncd"]
    cases += [bytes(draw.choices(b"ab\n", k=draw.randrange(40))) for _ in range(200)]
    for content in cases:
        found = list(lines_from_end(io.BytesIO(content)))[::-1]
        expected = content.splitlines(keepends=True)
        assert [line for _, line in found] == expected, content
        assert [begin for begin, _ in found] == [sum(map(len, expected[:n])) for n in range(len(expected))]


def test_of_a_line_without_end_only_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "AT_ONCE", 10)
    monkeypatch.setattr(files, "LONGEST_LINE", 16)
    assert list(lines_from_end(io.BytesIO(b"one\n" + b"x" * 95 + b"\ntwo\n"))) == [
        (100, b"two\n"),
        (4, b"x" * 16),
        (0, b"one\n"),
    ]


@pytest.mark.parametrize("at_once", [5, 64, 1 << 20])
def test_a_file_is_cut_behind_the_last_line_that_stays(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "AT_ONCE", at_once)
    for tail in (b"", b'{"step": 8, "te', b"\0" * 100, b"\xff\xfe\n", b"[1, 2]\n", b"\n\n", b'{"step": "1"}\n'):
        ends = write_lines(tmp_path / "log", 8, tail)
        for first in (0, 1, 5, 8, 100):
            assert where_to_cut(tmp_path / "log", number_of, first) == ends[min(first, 8)], (tail, first)
    (tmp_path / "log").write_bytes(b"")
    assert where_to_cut(tmp_path / "log", number_of, 3) == 0


def test_only_the_lines_behind_the_cut_are_looked_at(tmp_path: Path) -> None:
    looked_at = []

    def watched(begin: int, line: bytes) -> int | None:
        looked_at.append(number_of(begin, line))
        return looked_at[-1]

    ends = write_lines(tmp_path / "log", 50_000, b'{"step": 5')
    assert where_to_cut(tmp_path / "log", watched, 49_998) == ends[49_998]
    assert looked_at == [None, 49_999, 49_998, 49_997]
    assert where_to_cut(tmp_path / "log", watched, 0) == 0, "at the start all goes"
    assert len(looked_at) == 4


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"\n", b"\0\0\0\0", b"\xff", b"nothing", b"[1]", b"1", b"null", b"{}", b'{"step": null}'),
        *(b'{"step": "3"}', b'{"step": 3.0}', b'{"step": true}', b'{"step": -1}', b'{"step": [3]}', b'{"step": 3'),
        *(b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}"),
    ],
)
def test_what_is_no_numbered_line_is_none(line: bytes) -> None:
    assert numbered_line(line, "step") is None
    assert numbered_line(b'{"step": 3, "more": [1]}\n', "step") == {"step": 3, "more": [1]}
