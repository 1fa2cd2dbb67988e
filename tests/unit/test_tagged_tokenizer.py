"""A decoder's tokenizer gets `<image>` and `<video>`: their numbers, the files that change, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwen_hf import tiny_tokenizer, write_tokenizer
from tiny_folders import write_tokenizer as write_letters
from transformers import AutoTokenizer

from megavlm.errors import WeightsError
from megavlm.export.tagged_tokenizer import TaggedTokenizer, tagged_tokenizer

FREE = len(tiny_tokenizer(media_tokens=False))
TEXT = "<|im_start|>user\n<image>\nWhere is the <video>red square?<|im_end|>"


def written(made: TaggedTokenizer, folder: Path) -> Any:
    """transformers' tokenizer of the files."""
    folder.mkdir()
    for name, content in made.files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def as_released(folder: Path) -> None:
    """The files as those of Qwen2.5 came: written by transformers 4."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {str(token.pop("id")): token for token in tokenizer["added_tokens"]}
    config = {**config, "added_tokens_decoder": added}
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({token["content"]: int(at) for at, token in added.items()}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|im_start|>"]}))


@pytest.mark.parametrize("change", [lambda folder: None, as_released], ids=["transformers 5", "transformers 4"])
def test_missing_tags_get_the_next_free_numbers(change: Callable[[Path], None], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, media_tokens=False)
    change(tmp_path)
    made = tagged_tokenizer(tmp_path)
    assert made.tokens == (FREE, FREE + 1)
    mine = written(made, tmp_path / "out")
    assert mine(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
    assert mine.decode(mine(TEXT)["input_ids"], skip_special_tokens=True) == "user\n\nWhere is the red square?"
    config = json.loads(made.files["tokenizer_config.json"])
    assert config["additional_special_tokens"][-2:] == ["<image>", "<video>"] and "extra_special_tokens" not in config
    if "added_tokens.json" in made.files:
        assert json.loads(made.files["added_tokens.json"])["<video>"] == FREE + 1
        assert config["added_tokens_decoder"][str(FREE)]["content"] == "<image>"
        assert json.loads(made.files["special_tokens_map.json"])["additional_special_tokens"][1:] == [
            "<image>",
            "<video>",
        ]


def test_tags_that_are_there_stay(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    made = tagged_tokenizer(tmp_path)
    assert made.tokens == tuple(tiny_tokenizer().convert_tokens_to_ids(["<image>", "<video>"]))
    assert made.files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_vocabulary_and_merges(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, media_tokens=False)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in model["merges"]))
    made = tagged_tokenizer(tmp_path)
    assert made.tokens == (FREE, FREE + 1)
    assert written(made, tmp_path / "out")(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]


def test_numbers_that_transformers_would_not_give(tmp_path: Path) -> None:
    """The last number of the vocabulary is far from how many there are."""
    write_letters(tmp_path, image_token_id=127)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    vocabulary = content["model"]["vocab"]
    vocabulary["far"] = 900
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"token of <video> in .* = 901: transformers makes it \d+"):
        tagged_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"content of .*tokenizer.json = .* is not JSON"),
        ("[]", r"content of .*tokenizer.json = \[\]: should be a JSON object"),
        ("{}", r"tokens of = .*tokenizer.json': are not where they should be"),
        ('{"model": {"vocab": {"a": "b"}}, "added_tokens": []}', "are not where they should be"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": []}', r"tokenizer of = .*: cannot be read: "),
        (None, r"tokenizer of = .*: the folder holds none of tokenizer.json, tokenizer.model, vocab.json"),
    ],
)
def test_damaged_files_end_in_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(WeightsError, match=message) as caught:
        tagged_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
