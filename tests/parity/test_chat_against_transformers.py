"""Conversations against transformers' chat templates: Qwen2's messages, and InfiMM's as exported folders write them."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import numpy as np
import pytest
import qwen_hf
from infimm_hf import tiny_tokenizer

import megavlm.export.infimm_files as infimm_files
from megavlm.batch import IGNORED
from megavlm.data.chat import CHATML_SYSTEM, ChatConfig, encode_chat, encode_chatml
from megavlm.data.sample import Turn
from megavlm.data.tokenizer import Tokenizer

TALKS = [
    [("user", "<image>\nWhat is in the picture?"), ("assistant", "A red square.\n\nAnd a blue one, übrigens 😀.")],
    [("user", "  Where?\n"), ("assistant", " Left "), ("user", "And <image>, <image>?"), ("assistant", "\nNo.")],
    [("system", "Be brief."), ("user", "How many?"), ("assistant", "Two."), ("user", "Why?"), ("assistant", "")],
    [("user", "one"), ("user", "two"), ("assistant", "three"), ("assistant", "four")],
]


def turns(talk: list[tuple[str, str]]) -> list[Turn]:
    return [Turn(role, text) for role, text in talk]  # type: ignore[arg-type]


@pytest.mark.parametrize("talk", TALKS)
def test_each_message_is_tokenised_by_itself(talk: list[tuple[str, str]], tmp_path: Path) -> None:
    public = qwen_hf.tiny_tokenizer()
    public.save_pretrained(tmp_path)
    own_system = talk[0][0] == "system"
    expected: list[int] = []
    for role, text in talk if own_system else [("system", CHATML_SYSTEM), *talk]:
        expected += public.apply_chat_template([{"role": role, "content": text}], return_dict=False)
    hello = [{"role": "user", "content": "a"}]
    whole = public.apply_chat_template(hello, add_generation_prompt=True, return_dict=False)
    asked = whole[len(public.apply_chat_template(hello, return_dict=False)) :]
    tokenizer = Tokenizer(tmp_path)
    assert encode_chatml(turns(talk), tokenizer, "released").tokens.tolist() == expected
    opened = encode_chat(turns(talk), tokenizer, ChatConfig(mask="clean"), open_answer=True)
    assert opened.tokens.tolist() == expected + asked


@pytest.mark.parametrize("template", ["zephyr", "vicuna"])
@pytest.mark.parametrize("talk", TALKS)
def test_infimms_chats_are_those_of_its_folders(template: str, talk: list[tuple[str, str]], tmp_path: Path) -> None:
    public = tiny_tokenizer()
    public.save_pretrained(tmp_path)
    public.chat_template = (Path(infimm_files.__file__).parent / f"{template}.jinja").read_text(encoding="utf-8")
    messages = []
    for role, text in talk:
        # A newline behind an image is the data's, not the format's.
        pieces = text.replace("<image>\n", "<image>").split("<image>")
        parts = [[{"type": "image"}, {"type": "text", "text": piece}] for piece in pieces]
        messages.append({"role": role, "content": functools.reduce(operator.iadd, parts, [])[1:]})
    config = ChatConfig.from_dict({"template": template})
    for asks in (False, True):
        text = public.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        made = encode_chat(turns(talk), Tokenizer(tmp_path), config, open_answer=asks)
        assert made.tokens.tolist() == public(text)["input_ids"]
        answers = [said for role, said in talk if role == "assistant"]
        trained = public.decode(made.targets[made.targets != IGNORED].tolist())
        for answer in answers:
            # The tiny tokenizer knows few letters and no newline.
            known = public.decode(public(answer, add_special_tokens=False)["input_ids"]).strip()
            assert known in trained
        assert np.count_nonzero(made.targets == public.eos_token_id) == len(answers)
