"""The tokenizer of a Hugging Face folder: text to tokens and back, and the folder's chat format."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from megavlm.data.sample import IMAGE_TAG
from megavlm.errors import DataError, WeightsError
from megavlm.tiles import Ints

_LONGEST_CHARACTER = 32
"""Tokens that are waited for until they end in a whole character: such as several that nobody could read before."""
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in _FILES)


class Tokenizer:
    """What reading and writing text needs of transformers' tokenizers."""

    def __init__(self, folder: str | Path, added_tokens: Sequence[str] = ()) -> None:
        """`added_tokens`: words that each become one token, the next free ones, where the folder has none for them."""
        folder = Path(folder)
        where = "tokenizer of"
        if not has_tokenizer(folder):
            problem = f"the folder holds none of {', '.join(_FILES)}"
            raise WeightsError(where, str(folder), problem, "copy the files of the model's tokenizer into it")
        try:
            # Never code from the folder.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the tokenizers library raises plain Exceptions, and config.json is read along
            raise WeightsError(
                where, str(folder), f"cannot be read: {_in_one_line(error)}", "copy its files again"
            ) from error
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:  # what a file says of these is dropped on first use, and must not tell tokenizers apart
            backend.no_truncation()
            backend.no_padding()
        self._tokenizer.add_tokens([word for word in added_tokens if self.token_of(word) is None], special_tokens=True)
        self.folder = folder

    @property
    def fingerprint(self) -> str:
        """Tells tokenizers apart by what they make of texts, not by where they lie."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        said = backend.to_str() if backend is not None else repr(sorted(self._tokenizer.get_vocab().items()))
        return hashlib.sha256(said.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer sets around each (a beginning, as a rule)."""
        tokens: list[int] = self._tokenizer(text)["input_ids"]
        return tokens

    def encode_with_spans(self, text: str, surround: bool) -> tuple[Ints, Ints]:
        """(tokens [T], spans [T, 2]) of a text: the characters, from and up to, that each token stands for.

        `surround`: with the tokens that the tokenizer sets around each text, which stand for none.
        """
        if not self._tokenizer.is_fast:
            problem, remedy = "cannot tell where its tokens lie in a text", "add its tokenizer.json"
            raise WeightsError("tokenizer of", str(self.folder), problem, remedy)
        made = self._tokenizer(text, add_special_tokens=surround, return_offsets_mapping=True)
        tokens, spans = np.array(made["input_ids"], np.int64), np.array(made["offset_mapping"], np.int64)
        return tokens, spans.reshape(-1, 2)

    def encode_question(self, question: str, in_parts: bool = True) -> list[int]:
        """The tokens of a conversation that ends with this question, in the folder's chat format.

        `in_parts`: tags are given to it as parts of their own, for it to write; else they stay where they are.
        """
        if not self._tokenizer.chat_template:
            raise DataError(
                "--chat", str(self.folder), "the folder has no chat format", "leave out --chat, or add a chat_template"
            )
        content = self._content(question) if in_parts else question
        try:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # it is a program of the folder's, in a sandbox
            problem = f"the folder's chat format fails: {_in_one_line(error)}"
            raise DataError("--chat", str(self.folder), problem, "leave out --chat, or mend chat_template") from error
        # Formats that write the beginning themselves must not get a second one.
        bos = self._tokenizer.bos_token
        return self.encode(text.removeprefix(bos) if bos else text)

    def _content(self, question: str) -> str | list[dict[str, str]]:
        """Plain text; with images in it, a list of parts."""
        if IMAGE_TAG not in question:
            return question
        parts: list[dict[str, str]] = []
        for number, text in enumerate(question.split(IMAGE_TAG)):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        return parts

    def decode(self, tokens: list[int]) -> str:
        """The text of these tokens, special ones left out."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def pieces(self, tokens: Sequence[int]) -> list[tuple[str, bool]]:
        """What each token stands for in the text of all, and whether it is a special one.

        Where several tokens make one character, the last of them has it, and those before have nothing.
        """
        special = {*self._tokenizer.all_special_ids}
        special |= {number for number, added in self._tokenizer.added_tokens_decoder.items() if added.special}
        found: list[tuple[str, bool]] = []
        first = 0
        for place in range(len(tokens) + 1):
            if place == len(tokens) or tokens[place] in special:
                found += [(text, False) for text in self._words(tokens[first:place])]
                found += [(self._raw([token]), True) for token in tokens[place : place + 1]]
                first = place + 1
        return found

    def _words(self, tokens: Sequence[int]) -> list[str]:
        """The text of each of these tokens, none of which is special."""
        found: list[str] = []
        start, shown = 0, ""  # what the tokens from start on say, as far as one of them has it already
        for place, token in enumerate(tokens):
            said = self._raw(tokens[start : place + 1])
            is_whole = not said.endswith("\N{REPLACEMENT CHARACTER}") or place - start >= _LONGEST_CHARACTER
            if not is_whole and place + 1 < len(tokens):
                found.append("")
                continue
            found.append(said[len(shown) :])
            # The token stays before the next: some tokenizers drop the blank of a text's first one.
            start, shown = place, self._raw([token])
        return found

    def _raw(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    @property
    def end(self) -> str:
        """The word that closes a text."""
        found: str | None = self._tokenizer.eos_token
        if found is None:
            problem, remedy = "has no token that ends a text", "set eos_token in its tokenizer_config.json"
            raise WeightsError("tokenizer of", str(self.folder), problem, remedy)
        return found

    def token_of(self, word: str) -> int | None:
        """The one token that stands for a word, where there is one."""
        found = self._tokenizer.get_vocab().get(word)
        return None if found is None else int(found)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
