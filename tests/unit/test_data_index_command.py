"""`megavlm data index`: counts beside an index, what stays when it is made anew, and commands that mend."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from foreign_data import llava_record, write_json
from qwen_hf import write_tokenizer as write_plain_tokenizer
from random_samples import folder_bytes
from toy_data import kinds_of_samples, write_dataset, write_tokenizer

from megavlm.cli import main
from megavlm.data.chat import ChatConfig
from megavlm.data.formats import Words
from megavlm.data.index import Index
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import DataError

SAMPLES = kinds_of_samples()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Words:
    return Words(write_tokenizer(tmp_path_factory.mktemp("tokenizer")), ChatConfig())


def index(*arguments: str | Path) -> int:
    return main(["data", "index", *map(str, arguments)])


def test_counts_are_put_beside_the_index(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_dataset(tmp_path / "set", SAMPLES)
    before = folder_bytes(folder)
    assert index(folder, "--tokenizer", words.tokenizer.folder, "--workers", "2") == 0
    expected = [words.count(sample) for sample in SAMPLES]
    counts = Index.open(folder).token_counts(words.name, words.hash)
    assert list(zip(counts.tokens, counts.targets, strict=True)) == expected
    tokens, targets = map(sum, zip(*expected, strict=True))
    assert f"{words.name}: {tokens:,} tokens of text in 9 samples, {targets:,} trained" in capsys.readouterr().out
    after = folder_bytes(folder)
    assert {name: after[name] for name in before} == before
    (folder / "dataset.json").unlink()  # a folder of tars alone
    assert index(folder, "--tokenizer", words.tokenizer.folder, "--workers", "1") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("9 samples with ") and said[1].startswith(words.name)
    assert folder_bytes(folder).keys() == after.keys()


@pytest.mark.parametrize(
    "chat",
    [
        ChatConfig(mask="clean"),
        ChatConfig(template="zephyr", system='It\'s a "test"; $HOME'),
        ChatConfig(template="plain", caption_end="\n\\'\t"),
    ],
)
def test_an_error_of_missing_counts_names_the_command_that_makes_them(
    words: Words, tmp_path: Path, chat: ChatConfig
) -> None:
    folder = write_dataset(tmp_path / "a set", SAMPLES)
    wanted = Words(words.tokenizer, chat)
    with pytest.raises(DataError, match="are not in the index") as caught:
        Index.open(folder).token_counts(wanted.name, wanted.hash, wanted.options)
    assert "\n" not in str(caught.value)
    command = caught.value.remedy.removeprefix("run `").removesuffix("`")
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    program, *arguments = printed.stdout.split("\0")[:-1]
    assert program == "megavlm"
    assert main([*arguments, "--workers", "1"]) == 0
    assert len(Index.open(folder).token_counts(wanted.name, wanted.hash).tokens) == len(SAMPLES)


def test_what_the_shards_do_not_tell_stays_while_they_do(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.json", tmp_path / "out"
    write_json(source, [llava_record("x"), llava_record("y", "gone.png"), llava_record("z")])
    prepare = ["data", "prepare", str(source), "--out", str(out), "--workers", "1"]
    assert main(prepare) == 0
    said = capsys.readouterr().out
    assert index(out, "--tokenizer", words.tokenizer.folder, "--workers", "1") == 0
    before = folder_bytes(out)
    assert index(out, "--workers", "1") == 0
    assert folder_bytes(out) == before and "1  picture missing" in capsys.readouterr().out
    assert main(prepare) == 0
    assert capsys.readouterr().out == said
    # Killed while the index was exchanged: the file has been put aside, and nothing has taken its place.
    (out / ".indexing").mkdir()
    (out / "dataset.json").rename(out / ".indexing" / "dataset.json")
    assert index(out, "--workers", "1") == 0
    assert folder_bytes(out) == before
    write_dataset(tmp_path / "other", SAMPLES)
    (tmp_path / "other" / "shard-00000.tar").replace(out / "shard-00000.tar")
    assert index(out, "--workers", "1") == 0
    about = json.loads((out / "dataset.json").read_text())
    assert "plan" not in about and about["refused"] == {} and not (out / "index" / "tokens").exists()


def test_limits_that_a_tokenizer_file_sets_tell_nothing_apart(words: Words, tmp_path: Path) -> None:
    """They hold until the tokenizer is first used, and are no part of what it makes of a text."""
    folder = tmp_path / "limited"
    shutil.copytree(words.tokenizer.folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    limited = Tokenizer(folder)
    assert limited.fingerprint == words.tokenizer.fingerprint
    assert len(limited.encode("many words " * 9)) > 8
    assert limited.fingerprint == words.tokenizer.fingerprint


def test_mistakes_are_one_line(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_dataset(tmp_path / "set", SAMPLES)
    tokenizer, plain = str(words.tokenizer.folder), str(write_plain_tokenizer(tmp_path / "plain", media_tokens=False))
    cases: list[tuple[list[str], str]] = [
        ([], "DIR = None: is missing; write megavlm data index DIR"),
        ([str(folder), "more"], "is not all: one folder at a time"),
        ([str(folder), "--workers", "0"], "--workers = 0: is below 1"),
        ([str(folder), "--tokenizer", str(tmp_path)], "the folder holds none of tokenizer.json"),
        ([str(folder), "--tokenizer", plain], "has no token for <image>"),
        ([str(folder), "--tokenizer", tokenizer, "--template", "alpaca"], "--template = 'alpaca': must be one of"),
        ([str(tmp_path / "none"), "--tokenizer", tokenizer], "is no folder"),
        (["memory://x"], "give a local folder for the index"),
    ]
    for arguments, problem in cases:
        assert index(*arguments) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("megavlm: error: ") and problem in error
    with (folder / "shard-00000.tar").open("ab") as file:
        file.write(bytes(512))
    assert index(folder, "--tokenizer", tokenizer) == 2
    assert "1 shards differ from the index, such as shard-00000.tar" in capsys.readouterr().err
