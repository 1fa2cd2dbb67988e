"""Preparation: the same bytes for any number of processes and after any kill, and a report of what was refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from foreign_data import llava_record, picture, write_json, write_lines, write_pictures, write_tar

from megavlm.cli import main
from megavlm.data.index import Index
from megavlm.data.prepare import PrepareConfig, prepare, summary
from megavlm.data.prepare_plan import Counted, InputFile, Source, input_files, make_chunks
from megavlm.data.read import ShardReader
from megavlm.data.readers.base import ReadOptions
from megavlm.errors import ConfigError


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def samples_in(folder: Path) -> list[Any]:
    index = Index.open(folder)
    reader = ShardReader(folder, index)
    return [reader.read(number) for number in range(len(index))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A json array, lines and tars, with bad records among them, of 95 records in all."""
    folder = tmp_path_factory.mktemp("sources")
    write_pictures(folder / "chat", ["0.png", "1.png"])
    records = [llava_record(str(k % 7), [None, "0.png", "1.png", "gone.png"][k % 4], f"{k}?") for k in range(50)]
    write_json(folder / "chat" / "a.json", records[:30])
    write_lines(folder / "chat" / "b.jsonl", [*records[30:], 7])
    (folder / "pairs").mkdir()
    for shard in range(3):
        members = [
            (f"{k}.{s}", c) for k in range(8) for s, c in (("png", picture(k)), ("txt", f"{shard} {k}".encode()))
        ]
        write_tar(folder / "pairs" / f"0000{shard}.tar", members)
    (folder / "pairs" / "00003.tar").write_bytes(b"no tar")
    return [str(folder / "chat"), str(folder / "pairs")]


@pytest.fixture(scope="module")
def expected(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare(sources, PrepareConfig(out=str(out), workers=1, chunk_records=2))
    return out


def test_samples_come_in_the_order_of_the_input_with_unique_ids(expected: Path) -> None:
    samples = samples_in(expected)
    assert len(samples) == 38 + 24
    assert len({sample.id for sample in samples}) == len(samples)
    assert [sample.id for sample in samples[:4]] == ["0@a.json:0", "1@a.json:1", "2@a.json:2", "4@a.json:4"]
    assert samples[-1].id == "7@00002.tar:7"
    assert samples[-1].text == "<image>2 7"
    assert samples[-1].pictures[0].files == (picture(7),)
    assert [sample.source for sample in samples[::30]] == ["chat", "chat", "pairs"]


def test_refusals_are_listed_and_counted_by_kind(expected: Path) -> None:
    lines = [json.loads(line) for line in (expected / "index" / "refused.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [
        "00003.tar",
        *(f"{k % 7}@a.json:{k}" for k in range(3, 30, 4)),
        *(f"{k % 7}@b.jsonl:{k - 30}" for k in range(31, 50, 4)),
        "b.jsonl:20",
    ]
    report = Index.open(expected).report
    assert report.refused == {"file unusable": 1, "picture missing": 12, "wrong type": 1}
    assert "          12  picture missing" in summary(report, str(expected)).splitlines()


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(
    sources: list[str], expected: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    prepare(sources, PrepareConfig(out=str(out), workers=workers, chunk_records=2))
    assert content(out) == content(expected)


def test_a_run_that_is_killed_goes_on(sources: list[str], expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "megavlm", "data", "prepare", *sources, "--out", str(out), "--chunk-records", "2"]
    process = subprocess.Popen([*command, "--workers", "2"], start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob(".preparing/*.npz"))) < 4:
        time.sleep(0.002)
    process.kill()  # the parent alone: its workers have to notice
    assert process.wait() == -signal.SIGKILL
    _wait_for_end_of(process.pid)
    assert 4 <= len(list(out.glob(".preparing/*.npz"))) < 38
    prepare(sources, PrepareConfig(out=str(out), workers=2, chunk_records=2))
    assert content(out) == content(expected)


def _wait_for_end_of(session: int) -> None:
    """Wait until no process of that session is left."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(session, signal.SIGKILL)
    raise AssertionError("workers outlived the run that was killed")


def test_what_is_prepared_is_left_and_what_differs_is_refused(sources: list[str], expected: Path) -> None:
    before = content(expected)
    report = prepare(sources, PrepareConfig(out=str(expected), workers=2, chunk_records=2))
    assert report.samples == 62
    with pytest.raises(ConfigError, match="holds a dataset that was made with other settings"):
        prepare(sources, PrepareConfig(out=str(expected), chunk_records=8))
    with pytest.raises(ConfigError, match="is not empty"):
        prepare(sources, PrepareConfig(out=sources[0]))
    assert content(expected) == before


def test_a_mixture_takes_what_its_strategies_say(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", ["0.png"])
    for name in "abc":
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "set.json", [llava_record(str(k), "0.png") for k in range(10)])
    entries = [
        ("a", "first:25%", "pictures"),
        ("b", "end:2", "pictures"),
        ("c", "random:3", "pictures"),
        ("a", "all", "."),
    ]
    lines = [
        f"- {{json_path: {name}/set.json, sampling_strategy: '{strategy}', images: {images}}}"
        for name, strategy, images in entries
    ]
    (tmp_path / "mixture.yaml").write_text("datasets:\n" + "\n".join(lines))
    out = tmp_path / "out"
    report = prepare([], PrepareConfig(out=str(out), recipe=str(tmp_path / "mixture.yaml"), workers=1))
    ids = [sample.id for sample in samples_in(out)]
    assert ids[:5] == ["0@set.json:0", "1@set.json:1", "2@set.json:2", "8@set.json~2:8", "9@set.json~2:9"]
    assert len(ids) == 8
    assert all("@set.json~3:" in name for name in ids[5:])
    assert report.refused == {"picture missing": 10}  # the last entry looks for pictures elsewhere


def test_chunks_hold_a_fixed_number_of_the_records_that_are_taken() -> None:
    files = [InputFile(str(k), str(k), k // 2, "llava", "d", None, 0, 0) for k in range(4)]
    sources = [Source("x", strategy="end:7"), Source("y", strategy="random:50%")]
    counts = [Counted(5), Counted(4), Counted(0, "broken"), Counted(10)]
    chunks = make_chunks(sources, files, counts, ReadOptions(), 4, 0)
    assert [len(chunk) for chunk in chunks] == [4, 4, 4]
    taken = [(piece.file.label, int(number)) for chunk in chunks for piece in chunk.pieces for number in piece.numbers]
    assert taken[:7] == [("0", 2), ("0", 3), ("0", 4), *(("1", k) for k in range(4))]
    assert len({number for label, number in taken[7:] if label == "3"}) == 5
    assert taken[7:] == sorted(taken[7:])
    assert [len(chunk.problems) for chunk in chunks] == [1, 0, 0]


@pytest.mark.parametrize(
    ("source", "file", "dataset"),
    [
        ("Infinity-MM", "stage2/LVIS/0/00.jsonl", "stage2/LVIS/0"),
        ("the_cauldron", "ai2d/train-00000.jsonl", "ai2d"),
        ("OBELICS", "data/train-00000.jsonl", "OBELICS"),
        ("set.v2.jsonl", "", "set"),
    ],
)
def test_the_data_set_is_named_after_its_folder(tmp_path: Path, source: str, file: str, dataset: str) -> None:
    path = tmp_path / source / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [llava_record("x")])
    assert [found.dataset for found in input_files([Source(str(tmp_path / source))])] == [dataset]


def test_one_folder_is_prepared_by_one_run_at_a_time(sources: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".preparing").mkdir(parents=True)
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(out / ".preparing" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ConfigError, match="is being written by another process"):
            prepare(sources, PrepareConfig(out=str(out)))
        holder.communicate(b"\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["none.json", "--out", "out"], "source = 'none.json': does not exist"),
        (["--out", "out"], "SOURCE = None: is missing"),
        (["a.json"], "--out = None: is missing"),
        (["a.json", "a.json", "--out", "out"], "source = 'a.json': is given twice"),
        (["a.json", "--out", "out", "--format", "csv"], "--format = 'csv': is no format; use one of llava, "),
        (["a.json", "--out", "out", "--workers", "0"], "--workers = 0: is below 1"),
        (["broken.json", "--out", "out", "--format", "llava"], "cannot be used"),
        (
            ["refused.json", "--out", "out", "--workers", "1"],
            "every record was refused, as out/index/refused.jsonl says",
        ),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "a.json", [llava_record("x")])
    write_json(tmp_path / "refused.json", [llava_record("x", "gone.png")])
    (tmp_path / "broken.json").write_text('[{"conversations": []}')
    assert main(["data", "prepare", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("megavlm: error: ")
    assert problem in error


def test_the_commands_prepare_index_and_look_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "a.json", [llava_record("x"), llava_record("y")])
    command = ["data", "prepare", "a.json", "--out", "data/llava-665k", "--workers", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("2 samples with 0 pictures, ")
    before = content(tmp_path / "data")
    assert main(["data", "index", "data/llava-665k", "--workers", "1"]) == 0
    assert content(tmp_path / "data").keys() == before.keys()
    capsys.readouterr()
    assert main(["data", "catalog", "infimm/finetune", "--data", "data"]) == 0
    assert "differs in count" in capsys.readouterr().out
    assert main(["data", "prepaer"]) == 2
    assert "did you mean `megavlm data prepare`?" in capsys.readouterr().err
