"""`megavlm data lint`: each bad sample by its name, all others through the whole path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from random_samples import picture_file
from toy_data import SMALL, SMALL_GRID, chat, kinds_of_samples, write_dataset, write_tokenizer

from megavlm.cli import main
from megavlm.data import lint as lint_module
from megavlm.data.chat import ChatConfig
from megavlm.data.formats import SplicedFormat, Words
from megavlm.data.index import Index
from megavlm.data.lint import Bad, LintConfig, lint
from megavlm.data.look import CountWords
from megavlm.data.sample import Picture, Sample, Turn
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer

SAMPLES = kinds_of_samples()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lint")
    write_tokenizer(root / "tokenizer")
    write_dataset(root / "set", SAMPLES)
    words = Words(Tokenizer(root / "tokenizer"), ChatConfig())
    add_token_counts(root / "set", CountWords(str(root / "tokenizer"), ChatConfig()), words.name, words.hash)
    return root


def config_of(data: Path, **settings: object) -> LintConfig:
    given = {"tokenizer": str(data / "tokenizer"), "grid": "2/3", "tile_size": 56, "threads": 4}
    return LintConfig.from_dict({**given, **settings})


def bad_of(folder: Path, config: LintConfig) -> list[Bad]:
    found: list[Bad] = []
    report = lint(str(folder), config, found.append)
    assert report.bad == len(found)
    return found


def test_good_samples_are_counted(data: Path) -> None:
    report = lint(str(data / "set"), config_of(data), print)
    assert (report.samples, report.bad, report.note) == (len(SAMPLES), 0, "")
    words = Words(Tokenizer(data / "tokenizer"), ChatConfig())
    assert report.targets == sum(words.count(sample)[1] for sample in SAMPLES)
    pictures = Index.open(data / "set").pictures(range(len(SAMPLES)))
    cost = SplicedFormat(words.tokenizer, words.chat, SMALL_GRID, (0, 0)).costs(pictures)
    assert report.tiles == cost.tiles.sum()
    assert report.tokens == cost.tokens.sum() + sum(words.count(sample)[0] for sample in SAMPLES)


def test_every_fault_is_named(data: Path, tmp_path: Path) -> None:
    """Faults that a checksum shows, and faults that were there when the data were prepared."""
    rng = np.random.default_rng(1)
    cut = picture_file(rng, "JPEG", (40, 30))[:-200]
    samples = [
        chat("fine", [Picture((picture_file(rng, "PNG", (9, 9)),))], "What?", "Noise."),
        chat("cut picture", [Picture((cut,))], "What?", "Half."),
        chat("flipped picture", [Picture((picture_file(rng, "PNG", (9, 9)),))], "What?", "Noise."),
        chat("flipped words", [], "What?", "Nothing."),
        Sample("no answer", (), (Turn("user", "Anybody?"),)),
        Sample("no question", (), (Turn("system", "Be brief."),)),
        chat("long", [], "Much?", "very " * 300),
        chat("late", [], "What?", "Fine."),
    ]
    folder = write_dataset(tmp_path / "set", samples)
    rows, shard = Index.open(folder).rows(range(len(samples))), folder / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[int(rows.files.offset[2]) + 30] ^= 1
    content[int(rows.words.offset[3]) + 3] ^= 1
    shard.write_bytes(content)
    found = bad_of(folder, config_of(data, max_tokens=250, chat={"mask": "clean"}))
    assert [(bad.sample, bad.id) for bad in found] == [
        (1, "cut picture"),
        (2, "flipped picture"),
        (3, None),
        (4, "no answer"),
        (5, "no question"),
        (6, "long"),
    ]
    problems = [
        "picture 0",
        "the checksum of its picture file 0 differs",
        "the checksum of its text differs",
        "nothing of it is trained",
        "hold no question",
        "are more than 250",
    ]
    for bad, problem in zip(found, problems, strict=True):
        assert problem in bad.problem and bad.shard == "shard-00000.tar"
        assert str(bad).startswith(f"sample {bad.sample}") and "\n" not in str(bad) and "data lint" not in str(bad)
    shard.unlink()
    assert [bad.sample for bad in bad_of(folder, config_of(data))] == list(range(len(samples)))


def test_counts_of_other_words_are_named(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "set", tmp_path / "set")
    (counts,) = (tmp_path / "set").glob("index/tokens/*/targets.bin")
    values = np.fromfile(counts, "<u4")
    values[4] += 1
    values.tofile(counts)
    (bad,) = bad_of(tmp_path / "set", config_of(data))
    assert bad.sample == 4 and f"and the index says {int(values[4])}" not in bad.problem.partition(" and ")[0]
    assert bad.problem.endswith(f" and {values[4]}")
    shutil.rmtree(tmp_path / "set" / "index" / "tokens")
    report = lint(str(tmp_path / "set"), config_of(data), print)
    assert report.bad == 0 and f"megavlm data index {tmp_path / 'set'} --tokenizer" in report.note


def test_what_would_stop_a_run_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own mistakes, which no file provokes."""

    def fail(self: SplicedFormat, sample: Sample, *_: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(SplicedFormat, "document", fail)
    found = bad_of(data / "set", config_of(data))
    assert [bad.problem for bad in found] == ["fails: ZeroDivisionError: of ours"] * len(SAMPLES)


def test_few_samples_are_under_way() -> None:
    started: list[int] = []

    def look(number: int) -> lint_module._Seen:
        started.append(number)
        return lint_module._Seen(None, number)

    seen = lint_module._in_order(look, range(1000), 3)
    assert [next(seen).tokens for _ in range(10)] == list(range(10))
    assert len(started) <= 10 + 3 * lint_module.AHEAD
    assert [one.tokens for one in seen] == list(range(10, 1000))


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "lint", str(data / "set"), "--tokenizer", str(data / "tokenizer")]
    assert main([*command, *SMALL]) == 0
    assert "9 samples, all good: " in capsys.readouterr().out
    assert main([*command, "--template", "zephyr", "--tile-size", "28", "--json"]) == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [(line["sample"], line["id"]) for line in lines] == [(4, "video"), (5, "both")]
    assert "<video>" in lines[0]["problem"] and "9 samples, 2 bad" in captured.err
    cases = [
        ([str(tmp_path / "none"), *command[3:]], "is no folder"),
        (command[2:3], "--tokenizer = None: is missing"),
        ([*command[2:4], str(tmp_path)], "the folder holds none of tokenizer.json"),
        ([*command[2:], "--threads", "0"], "--threads = 0: is below 1"),
    ]
    for arguments, problem in cases:
        assert main(["data", "lint", *arguments]) == 2, arguments
        assert problem in capsys.readouterr().err.splitlines()[-1]
