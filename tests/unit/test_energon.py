"""The files by which Megatron-Energon opens a folder: equal to its own, and made as safely as all else."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import pytest
from energon_reference import REFERENCE, files_in, write_tars
from foreign_data import llava_record, write_json
from foreign_tars import chat, write_tar
from random_samples import RandomChunk, folder_bytes

from megavlm.cli import main
from megavlm.data.energon import write_energon
from megavlm.data.index import Index
from megavlm.data.index_build import build_index
from megavlm.data.shards import write_shards
from megavlm.errors import DataError

META = ".nv-meta/"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Three shards and what Energon wants."""
    folder = tmp_path / "set"
    write_shards([RandomChunk(seed, 5) for seed in range(3)], folder)
    write_energon(folder)
    return folder


def metas(folder: Path) -> dict[str, bytes]:
    """What is there for Energon alone."""
    return {name: data for name, data in folder_bytes(folder).items() if name.startswith(META) or name.endswith(".idx")}


def test_the_files_are_those_of_energon_prepare(tmp_path: Path) -> None:
    write_tars(tmp_path)
    report = build_index(tmp_path)
    write_energon(tmp_path)
    assert files_in(tmp_path) == json.loads(REFERENCE.read_text(encoding="utf-8"))
    counts = json.loads((tmp_path / META / ".info.json").read_text())["shard_counts"]
    split = (tmp_path / META / "split.yaml").read_text()
    assert split.startswith(
        'split_parts:\n  train:\n  - "a.tar"\n  - "shard-00000.tar"\n  - "sub/b.c.tar"\n  - "x é.tar"\n'
        '  val: []\n  test: []\nexclude:\n  - "a.tar/k01-bad"\n  - "a.tar/\\\\{a,b\\\\}k02"\n  - "a.tar/z/__k03__"\n'
    )
    assert sum(counts.values()) - split.partition("exclude:")[2].count("\n  - ") == report.samples


def test_others_overlook_what_is_there_for_energon(prepared: Path) -> None:
    before = folder_bytes(prepared)
    build_index(prepared)
    assert folder_bytes(prepared) == before
    assert not (prepared / ".energon").exists()


def test_any_number_of_processes_and_a_killed_run_give_the_same_bytes(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megavlm.data.energon._WORTH_PROCESSES", 0)
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    shutil.rmtree(other / META)

    def kill(_: int, samples: int) -> None:
        if samples > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_energon(other, on_progress=kill)
    assert not (other / META).exists() and len(list(other.glob(".energon/*/*.npz"))) == 1
    write_energon(other, workers=2)
    assert folder_bytes(other) == folder_bytes(prepared)


def test_new_shards_get_new_files_and_those_of_others_are_left(prepared: Path) -> None:
    old = metas(prepared)
    write_tar(prepared / "new.tar", [("x.json", chat("more"))])
    assert main(["data", "index", str(prepared), "--workers", "1"]) == 0  # without --energon: they are kept true
    new = metas(prepared)
    assert new.keys() == {*old, "new.tar.idx"} and new[META + "index.uuid"] != old[META + "index.uuid"]
    theirs = prepared / META / "index.uuid"
    theirs.write_text(str(uuid.uuid4()))
    shutil.rmtree(prepared / "index")
    (prepared / "new.tar").unlink()
    assert main(["data", "index", str(prepared), "--workers", "1", "--energon"]) == 0
    assert metas(prepared) == new | {META + "index.uuid": theirs.read_bytes()}


def test_a_damaged_archive_gives_the_samples_before_its_damage(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [(f"{key}.json", chat(key)) for key in "abc"])
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: data.index(b"c.json")])
    (tmp_path / "y.tar").write_bytes(data[:700])
    assert build_index(tmp_path).samples == 1
    write_energon(tmp_path)
    found = files_in(tmp_path)
    assert found["info"]["shard_counts"] == {"x.tar": 1}
    assert [row[1] for row in found["samples"]] == ["a"] and list(found["offsets"]) == ["x.tar.idx"]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice, changed = tmp_path / "twice", tmp_path / "changed"
    for shard in "xy":
        write_tar(twice / f"{shard}.tar", [(f"{key}.json", chat(key)) for key in ("same", shard)])
    build_index(twice)
    with pytest.raises(DataError, match=r"y\.tar.*its sample 'same' has the name of another one"):
        write_energon(twice)
    write_tar(changed / "x.tar", [("a.json", chat("a")), ("b.json", chat("b"))])
    build_index(changed)
    write_tar(changed / "x.tar", [("a.json", chat("a" * 600)), ("b.json", chat("b"))])
    with pytest.raises(DataError, match=r"differs from its index; run `megavlm data index"):
        write_energon(changed)
    assert not metas(twice).keys() - {"x.tar.idx", "y.tar.idx"} and not metas(changed)
    assert main(["data", "index", "memory://shards", "--into", str(tmp_path / "into"), "--energon"]) == 2
    assert "--energon = 'memory://shards': is in an object store, which is only read here" in capsys.readouterr().err


def test_prepare_writes_them_unless_told_not_to(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [llava_record(str(number)) for number in range(4)])
    command = ["data", "prepare", str(tmp_path / "a.json"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--no-energon"]) == 0
    plain = folder_bytes(tmp_path / "out")
    assert not metas(tmp_path / "out")
    assert main(command) == 0  # prepared already: they are added
    after = folder_bytes(tmp_path / "out")
    assert {name: after[name] for name in plain} == plain and after.keys() - plain.keys() == metas(
        tmp_path / "out"
    ).keys()
    assert len(Index.open(tmp_path / "out")) == 4
