"""The JSON member of a sample: ours survives, that of others is understood or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_samples import random_sample

from megavlm.data.sample import Picture, Sample, Turn
from megavlm.data.sample_json import MOST_JSON_BYTES, check_words, decode_words, encode_words

ASKED = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))


def test_samples_survive() -> None:
    rng = np.random.default_rng(0)
    for number in range(100):
        sample = random_sample(rng, f"id {number}")
        files = [file for picture in sample.pictures for file in picture.files]
        assert decode_words(encode_words(sample), "other").with_files(files) == sample


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
        {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            ]
        },
        {"texts": [{"user": "<image>\nWhat?", "assistant": "A cat."}]},
        [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    ],
)
def test_conversations_of_others(record: object) -> None:
    words = decode_words(json.dumps(record).encode(), "its place")
    assert words.with_files([b"cat"]) == Sample("its place", (Picture((b"cat",)),), ASKED)


@pytest.mark.parametrize("key", ["text", "caption"])
def test_documents_of_others(key: str) -> None:
    words = decode_words(json.dumps({"id": 7, key: "<image>A cat."}).encode(), "its place")
    assert words.with_files([b"cat"]) == Sample("7", (Picture((b"cat",)),), text="<image>A cat.")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"9" * 10_000, "no JSON"),
        (b"7", "no text that is understood"),
        (b"{}", "no text that is understood"),
        (b'{"text": ""}', "no text that is understood"),
        (b'{"text": "\\ud800"}', "no Unicode"),
        (b'{"turns": [7]}', "no JSON object"),
        (b'{"turns": [{"role": "tool", "text": "x"}]}', "unknown role"),
        (b'{"turns": [{"role": ["user"], "text": "x"}]}', "unknown role"),
        (b'{"turns": [{"role": "user"}]}', "holds no text"),
        (b'{"turns": [{"role": "user", "text": [{"type": "audio"}]}]}', "unknown type"),
        (b'{"text": "x", "frames": 3}', "no list of numbers"),
        (b'{"text": "x", "frames": [-1]}', "no list of numbers"),
        (b'{"text": "x", "frames": [true]}', "no list of numbers"),
    ],
)
def test_words_that_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_words(data, "x")


def test_pictures_must_fit_the_words() -> None:
    words = decode_words(b'{"text": "<image><video>", "frames": [0, 3]}', "x")
    assert [len(picture.files) for picture in words.with_files([b""] * 4).pictures] == [1, 3]
    with pytest.raises(ValueError, match="differ in number"):
        words.with_files([b""] * 3)
    with pytest.raises(ValueError, match="differ in number"):
        decode_words(b'{"text": "x", "frames": [2147483647]}', "x").with_files([])
    with pytest.raises(ValueError, match="tags and its pictures"):
        decode_words(b'{"text": "<image><image>"}', "x").with_files([b""])


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (Sample("x", ()), "no text"),
        (Sample("x", (Picture((b"1",)),), ASKED, "text"), "both"),
        (Sample("x", (), ASKED), "tags and its pictures"),
        (Sample("x", (Picture((b"1", b"2")),), ASKED), "several files"),
        (Sample("x", (Picture(()),), ASKED), "no file"),
    ],
)
def test_samples_that_contradict_themselves(sample: Sample, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_words(sample)


def test_text_that_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="no Unicode"):
        encode_words(Sample("x", (), text="\ud800"))
    with pytest.raises(ValueError, match="too long"):
        encode_words(Sample("x", (), text="a" * MOST_JSON_BYTES))
