"""Conversations to tokens and targets, in the formats that the published models were trained on.

A turn's text holds `<image>` and `<video>` where these belong. Before a format is applied, as in LLaVA-NeXT:

- a first turn that is the assistant's is dropped;
- a turn with exactly one tag that is not at its start gets it there, with a newline behind it, and the rest stripped;
  where a turn has several tags, they stay in place.

A first turn of the role system takes the place of the format's own system message. Words that are special tokens of
the tokenizer are such within a turn too, as in the public code.

The formats:

- chatml, of Qwen2.5 and Aquila-VL. Each message is tokenised by itself, with nothing around it.
- zephyr and vicuna (v1.1), of InfiMM: as its chat templates write them. The whole conversation is tokenised at once, so
  it begins as the tokenizer lets all texts begin. `<|endofchunk|>` goes before each image; a newline behind the image,
  which LLaVA's data have there, is dropped.
- plain: tags and a caption, then what closes it. All else that the user says is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from megavlm.batch import IGNORED
from megavlm.config import Config, require
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG, Role, Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import DataError, WeightsError
from megavlm.tiles import Ints

Mask = Literal["released", "clean"]

TAGS = (IMAGE_TAG, VIDEO_TAG)
END_OF_CHUNK = "<|endofchunk|>"
MESSAGE_START, MESSAGE_END = "<|im_start|>", "<|im_end|>"
CHATML_SYSTEM = "You are a helpful assistant."
_TAG = re.compile("|".join(map(re.escape, TAGS)))
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Config):
    """How a conversation becomes tokens, and which of them are trained."""

    template: Literal["chatml", "zephyr", "vicuna", "plain"] = "chatml"
    """The format."""
    mask: Mask = "released"
    """Of chatml. clean: the assistant's words and what ends its message. released: all of the assistant's messages, and
    in all messages the tokens of the newline, `<|im_start|>` and `<|im_end|>`: the released Aquila-VL saw these. The
    other formats train the answers and what ends them."""
    system: str | None = None
    """The system message of conversations without one of their own; none: the format's (zephyr's is empty)."""
    caption_end: str | None = None
    """What closes a caption in the plain format; none: `<|endofchunk|>`, where the tokenizer has it, and the end of a
    text. LLaVA has a newline there."""

    def check(self) -> None:
        is_plain = self.template == "plain"
        require(not is_plain or self.system is None, self, "system", "is not written in the plain format", "drop it")
        problem = "is of the plain format only"
        require(is_plain or self.caption_end is None, self, "caption_end", problem, "drop it, or use template plain")


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens."""

    tokens: Ints
    """[T]: one for each tag."""
    targets: Ints
    """[T]: the token itself where it is trained, else IGNORED."""


class _Part(NamedTuple):
    """A piece of a text, and whether it is trained."""

    text: str
    is_answer: bool = False


def encode_chat(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    config: ChatConfig,
    where: str = "conversation",
    open_answer: bool = False,
) -> Encoded:
    """A conversation in one of the formats; `where` names it in errors.

    `open_answer`: ends where the assistant's next answer is to begin, as generation wants it.
    """
    if config.template == "chatml":
        system = CHATML_SYSTEM if config.system is None else config.system
        return encode_chatml(turns, tokenizer, config.mask, system, where, open_answer)
    turns = _ordered(turns, where)
    if config.template == "plain":
        parts = _plain(turns, tokenizer, config.caption_end, where, open_answer)
    else:
        _refuse_videos(turns, where)
        write = _zephyr if config.template == "zephyr" else _vicuna
        parts = write(turns, config.system, tokenizer.end, open_answer)
    return _encode(parts, tokenizer, surround=True)


def encode_chatml(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    mask: Mask,
    system: str = CHATML_SYSTEM,
    where: str = "conversation",
    open_answer: bool = False,
) -> Encoded:
    """A conversation as `<|im_start|>`role newline text `<|im_end|>` newline, for each message."""
    turns = _ordered(turns, where)
    if turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    messages = []
    for role, text in turns:
        is_answer = role == "assistant"
        header, content = _Part(f"{MESSAGE_START}{role}\n"), _Part(text + MESSAGE_END, is_answer)
        if mask == "released" and is_answer:
            messages.append([_Part(f"{header.text}{content.text}\n", True)])
        else:
            messages.append([header, content, _Part("\n")])
    if open_answer:
        messages.append([_Part(f"{MESSAGE_START}assistant\n")])
    made = [_encode(parts, tokenizer, surround=False) for parts in messages]
    tokens = np.concatenate([message.tokens for message in made])
    targets = np.concatenate([message.targets for message in made])
    if mask == "released":
        always = np.isin(tokens, _always_trained(tokenizer))
        targets[always] = tokens[always]
    return Encoded(tokens, targets)


def _always_trained(tokenizer: Tokenizer) -> list[int]:
    """What the released mask trains in every message."""
    words = {word: tokenizer.token_of(word) for word in (MESSAGE_START, MESSAGE_END)}
    newline, _ = tokenizer.encode_with_spans("\n", surround=False)
    words["\n"] = int(newline[0]) if len(newline) == 1 else None
    for word, token in words.items():
        if token is None:
            problem = f"has no single token for {word!r}"
            raise WeightsError(
                "tokenizer of", str(tokenizer.folder), problem, "take Qwen2.5's, the clean mask, or another template"
            )
    return [token for token in words.values() if token is not None]


def _ordered(turns: Sequence[Turn], where: str) -> list[Turn]:
    """The turns that count, each with a single tag at its start."""
    for number, turn in enumerate(turns):
        if turn.role not in get_args(Role):
            remedy = f"use one of {', '.join(get_args(Role))}"
            raise DataError(f"{where}: role of turn {number}", turn.role, "is none we know", remedy)
        if turn.role == "system" and number > 0:
            problem = "is a system message behind another turn"
            raise DataError(f"{where}: turn {number}", turn.text, problem, "put it first, or drop it")
    kept = list(turns[1:] if turns and turns[0].role == "assistant" else turns)
    if not any(turn.role != "system" for turn in kept):
        raise DataError(f"{where}: turns", len(turns), "hold no question", "drop the sample")
    return [Turn(turn.role, tag_first(turn.text)) for turn in kept]


def tag_first(text: str) -> str:
    """A turn as training has it: its tag at the start, where it has one."""
    tags = _TAG.findall(text)
    if len(tags) != 1 or text.startswith(tags[0]):
        return text
    return f"{tags[0]}\n{text.replace(tags[0], '').strip()}".strip()


def _zephyr(turns: list[Turn], system: str | None, end: str, open_answer: bool) -> list[_Part]:
    """`<|role|>` newline text, the end of a text, newline, for each message; a system message always first."""
    if turns[0].role != "system":
        turns = [Turn("system", system or ""), *turns]
    parts = []
    for role, text in turns:
        parts += [_Part(f"<|{role}|>\n"), _Part(_with_chunks(text) + end, role == "assistant"), _Part("\n")]
    return [*parts, _Part("<|assistant|>\n")] if open_answer else parts


def _vicuna(turns: list[Turn], system: str | None, end: str, open_answer: bool) -> list[_Part]:
    """The system message, then USER: question ASSISTANT: answer, the end of a text, and so on, in one line."""
    if turns[0].role != "system":
        turns = [Turn("system", VICUNA_SYSTEM if system is None else system), *turns]
    parts = []
    for role, text in turns:
        said = _with_chunks(text)
        if role == "assistant":
            parts += [_Part("ASSISTANT:"), _Part(f" {said}{end}", True)]
        else:
            parts.append(_Part(f"{'USER: ' if role == 'user' else ''}{said} "))
    return [*parts, _Part("ASSISTANT:")] if open_answer else parts


def _plain(
    turns: list[Turn], tokenizer: Tokenizer, caption_end: str | None, where: str, open_answer: bool
) -> list[_Part]:
    """The tags of what the user says, and the caption."""
    tags = _Part("".join(tag for turn in turns if turn.role == "user" for tag in _TAG.findall(turn.text)))
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if len(answers) != (0 if open_answer else 1):
        problem = f"there are {len(answers)} of them, and a caption is one answer"
        raise DataError(f"{where}: answers", answers, problem, "use another template for conversations")
    if open_answer:
        return [tags]
    if caption_end is None:
        caption_end = ("" if tokenizer.token_of(END_OF_CHUNK) is None else END_OF_CHUNK) + tokenizer.end
    return [tags, _Part(answers[0].strip() + caption_end, True)]


def _with_chunks(text: str) -> str:
    """A turn as InfiMM reads it."""
    return text.replace(f"{IMAGE_TAG}\n", IMAGE_TAG).replace(IMAGE_TAG, END_OF_CHUNK + IMAGE_TAG)


def _refuse_videos(turns: list[Turn], where: str) -> None:
    for turn in turns:
        if VIDEO_TAG in turn.text:
            raise DataError(where, turn.text, f"has a {VIDEO_TAG}, which InfiMM does not read", "drop the sample")


def _encode(parts: Sequence[_Part], tokenizer: Tokenizer, surround: bool) -> Encoded:
    """The parts tokenised as one text; a token is trained where its first character is in an answer."""
    text = "".join(part.text for part in parts)
    tokens, spans = tokenizer.encode_with_spans(text, surround)
    starts = np.cumsum([0, *(len(part.text) for part in parts)])[:-1]
    part_of_token = np.searchsorted(starts, spans[:, 0], side="right") - 1
    is_trained = np.array([part.is_answer for part in parts])[part_of_token] & (spans[:, 1] > spans[:, 0])
    tags = [_token_of_tag(tag, tokenizer) for tag in TAGS if tag in text]
    return Encoded(tokens, np.where(is_trained & ~np.isin(tokens, tags), tokens, IGNORED))


def _token_of_tag(tag: str, tokenizer: Tokenizer) -> int:
    token = tokenizer.token_of(tag)
    if token is None:
        remedy = f"add {tag} to its special tokens"
        raise WeightsError("tokenizer of", str(tokenizer.folder), f"has no token for {tag}", remedy)
    return token
