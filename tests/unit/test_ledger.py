"""The ledger: what is named and what is counted, and what a run that goes on keeps of it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.data.ledger import MOST_NAMED, SIZES, LedgerWriter, check_ledger, digest, set_aside
from megavlm.data.loader import Damage, SampleName, StepBatches
from megavlm.data.order import SourceConfig, StepOrder, StreamConfig
from megavlm.data.packing import PackLimits, pack_step
from megavlm.data.step_plan import StepPlan
from megavlm.errors import DataError

NAMES = ["laion-115m", "mmc4", "laion-115m"]
"""The last is another part of the first."""
LINE = "rank-00000.jsonl"


def step_of(samples: int = 5120, cut: int = 1200, left_out: int = 0, step: int = 3) -> StepBatches:
    """Of the samples every third is of each source; the first ones are cut, those behind them left out."""
    order = StepOrder(
        [StreamConfig(samples_per_step=samples, sources=(SourceConfig(name="x", weight=1),))], {"x": 10**6}, 1
    )
    found = replace(order.step(step), source=np.arange(samples) % 3)
    places = np.arange(samples)
    packing = pack_step(np.full(samples, 8), np.zeros(samples), PackLimits(max_tokens=64, length_multiple=8))
    is_dropped = (places >= cut) & (places < cut + left_out)
    plan = StepPlan(found, np.full(samples, 8), np.zeros(samples, np.int64), places < cut, is_dropped, {}, packing)
    return StepBatches(step, [], [], [], plan)


def damage_of(found: StepBatches, places: range, problem: str = "broken", is_too_long: bool = False) -> list[Damage]:
    samples = found.plan.samples
    return [
        Damage(0, 0, SampleName(one, NAMES[samples.source[one]], int(samples.index[one]), 0), problem, is_too_long)
        for one in places
    ]


def settings_of(is_full: bool = False) -> dict[str, Any]:
    return {"data": {"streams": [], "full_ledger": is_full}, "seed": 1, SIZES: {}}


def line_of(folder: Path, found: StepBatches, damaged: list[Damage], is_full: bool = False) -> dict[str, Any]:
    writer = LedgerWriter(folder, 0, settings_of(is_full), found.step)
    writer.write(found, np.arange(len(found.plan.samples.index)), damaged, NAMES)
    writer.close()
    line: dict[str, Any] = json.loads((folder / LINE).read_text().splitlines()[-1])
    return line


def test_what_is_cut_by_design_is_counted_and_not_named(tmp_path: Path) -> None:
    found = step_of(left_out=90)
    line = line_of(tmp_path, found, [])
    assert "notes" not in line
    cut, left_out = line["counted"]["cut"], line["counted"]["left out"]
    assert cut["samples"] == {"laion-115m": 800, "mmc4": 400}
    assert left_out["samples"] == {"laion-115m": 60, "mmc4": 30}
    assert int(cut["digest"], 16) == digest(found.plan.samples, np.arange(1200), NAMES)
    assert (tmp_path / LINE).stat().st_size < 300


def test_lines_tell_whether_two_runs_cut_the_same_samples(tmp_path: Path) -> None:
    found = step_of()
    is_cut = found.plan.is_cut.copy()
    is_cut[[0, 1200]] = False, True  # both of laion-115m
    other = replace(found, plan=replace(found.plan, is_cut=is_cut))
    one, same, another = (
        line_of(tmp_path / name, step, []) for name, step in zip("abc", (found, found, other), strict=True)
    )
    assert one == same
    assert one != another
    assert one["counted"]["cut"]["samples"] == another["counted"]["cut"]["samples"]


def test_counts_and_digests_of_ranks_add_up(tmp_path: Path) -> None:
    found, places = step_of(), np.arange(5120)
    for rank in range(2):
        LedgerWriter(tmp_path, rank, settings_of(), 0, 2).write(found, places[places % 2 == rank], [], NAMES)
    lines = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank-*.jsonl"))]
    total = sum(int(line["counted"]["cut"]["digest"], 16) for line in lines) % 2**64
    assert total == digest(found.plan.samples, np.arange(1200), NAMES)
    assert sum(sum(line["counted"]["cut"]["samples"].values()) for line in lines) == 1200


def test_damage_is_named_up_to_a_bound(tmp_path: Path) -> None:
    found = step_of()
    few = line_of(tmp_path, found, damage_of(found, range(2000, 2003), "x" * 1000))
    assert [(note["source"], note["index"]) for note in few["notes"]] == [
        (NAMES[place % 3], int(found.plan.samples.index[place])) for place in range(2000, 2003)
    ]
    assert all(note["problem"].startswith("xxx") and len(note["problem"]) == 300 for note in few["notes"])
    assert few["counted"].keys() == {"cut"}
    many = line_of(tmp_path, found, damage_of(found, range(2000, 5000)))
    assert len(many["notes"]) == MOST_NAMED
    counted = many["counted"]["damaged"]
    assert sum(counted["samples"].values()) == 3000 - MOST_NAMED
    assert int(counted["digest"], 16) == digest(found.plan.samples, np.arange(2000 + MOST_NAMED, 5000), NAMES)


def test_samples_that_prove_impossible_to_cut_are_counted_once(tmp_path: Path) -> None:
    found = step_of()
    damaged = damage_of(found, range(1190, 1200), "longer than the run allows", is_too_long=True)
    counted = line_of(tmp_path, found, damaged)["counted"]
    numbers = {what: sum(one["samples"].values()) for what, one in counted.items()}
    assert numbers == {"cut": 1190, "left out: cannot be cut": 10}


def test_a_full_ledger_names_everything(tmp_path: Path) -> None:
    found = step_of(left_out=5)
    damaged = damage_of(found, range(3), "y" * 1000, is_too_long=True) + damage_of(found, range(3000, 3100))
    line = line_of(tmp_path, found, damaged, is_full=True)
    problems = [note["problem"] for note in line["notes"]]
    assert "counted" not in line
    assert problems == ["left out: " + "y" * 1000] * 3 + ["broken"] * 100 + ["cut"] * 1197 + ["left out"] * 5
    assert sum(map(len, line["names"].values())) == 5120


def text_lines(steps: range) -> list[bytes]:
    return [json.dumps({"step": step, "samples": 1, "digest": "0" * 16}).encode() + b"\n" for step in steps]


BROKEN_ENDS = {
    "nothing": b"",
    "torn": b'{"step": 9, "sam',
    "zeros": b"\0" * 4096,
    "not UTF-8": b"\xff\xfe\xfa\n",
    "no JSON": b"what is this\n\n",
    "JSON without a step": b'{"notes": []}\n[1]\n17\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("end", BROKEN_ENDS.values(), ids=BROKEN_ENDS)
def test_lines_from_a_step_on_and_broken_ones_are_set_aside(end: bytes, tmp_path: Path) -> None:
    path, lines = tmp_path / LINE, text_lines(range(9))
    path.write_bytes(b"".join(lines) + end)
    for number, (first, kept) in enumerate(((9, 9), (6, 6), (6, 6), (0, 0), (4, 0))):
        before = path.read_bytes()
        aside = set_aside(path, first)
        assert path.read_bytes() == b"".join(lines[:kept])
        moved = before[path.stat().st_size :]
        assert (aside.read_bytes() if aside else b"") == moved, number
    asides = sorted(tmp_path.glob("set-aside-*"))
    assert [one.name for one in asides] == [f"set-aside-{number:04d}-{LINE}" for number in range(len(asides))]
    assert sum(one.stat().st_size for one in asides) == len(b"".join(lines) + end), "nothing is thrown away"


def test_a_whole_line_that_lacks_its_end_is_kept(tmp_path: Path) -> None:
    path, lines = tmp_path / LINE, text_lines(range(4))
    path.write_bytes(b"".join(lines)[:-1])
    assert set_aside(path, 9) is None
    assert path.read_bytes() == b"".join(lines)


def test_nothing_that_was_set_aside_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / LINE
    taken = tmp_path / f"set-aside-0001-{LINE}"
    taken.write_bytes(b"precious")
    path.write_bytes(b"".join(text_lines(range(3))))
    aside = set_aside(path, 1)
    assert aside is not None and aside.name == f"set-aside-0002-{LINE}" and taken.read_bytes() == b"precious"


def test_a_ledger_of_another_form_is_set_aside_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LINE).write_bytes(b"3,5120,00ff\n" * 1000)
    (tmp_path / "rank-00000 (copy).jsonl").write_bytes(b"of somebody")
    with caplog.at_level(logging.INFO, "megavlm"):
        LedgerWriter(tmp_path, 0, settings_of(), 3).close()
        LedgerWriter(tmp_path, 0, settings_of(), 3).close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: the lines behind step 3, and what cannot be read there, are set aside (set-aside-0000-{LINE})"
    ]
    assert (tmp_path / LINE).read_bytes() == b""


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"data": 3, "seed": 1}', b'{"data": {"streams": []}}']
)
def test_damaged_settings_are_refused_in_a_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(DataError, match=r"data.json': cannot be read; copy it again, or save to another folder"):
        LedgerWriter(tmp_path, 0, settings_of(), 3)


def test_a_ledger_that_named_what_was_cut_goes_on_and_is_checked(tmp_path: Path) -> None:
    stream = StreamConfig(samples_per_step=4, sources=(SourceConfig(name="x", weight=1),))
    order = StepOrder([stream], {"x": 100}, 1)
    named: dict[str, Any] = {"notes": [{"source": "x", "index": 3, "problem": "cut"}]}
    counted: dict[str, Any] = {
        "counted": {"cut": {"samples": {"x": 2}, "digest": "0"}},
        "notes": [{"problem": "no JPEG"}],
    }
    lines = []
    for step, more in enumerate((named, counted)):
        word = f"{digest(order.step(step), np.arange(4), ['x']):016x}"
        lines.append(json.dumps({"step": step, "samples": 4, "digest": word, **more}))
    path = tmp_path / LINE
    path.write_text("\n".join(lines) + "\n")
    assert set_aside(path, 2) is None
    found = check_ledger(tmp_path, order)
    assert (found.damaged, found.shortened, found.wrong) == (1, 3, [])
    for bad in (
        '{"step": 2}',
        '{"step": 2, "samples": 4, "digest": 5}',
        '{"step": 2, "samples": 4, "digest": "0", "counted": [1]}',
        "\0",
    ):
        path.write_text("\n".join([*lines, bad]))
        assert check_ledger(tmp_path, order).wrong == [f"{LINE}, line 3: broken off, or none of a ledger"]
