"""The closed list of words and characters that the toy world's texts are made of: what a toy tokenizer needs."""

from __future__ import annotations

import re
from functools import cache

from megavlm.data.toy_world.questions import PHRASES
from megavlm.data.toy_world.text import ALL_OF_IT, FRAGMENTS, INTRODUCTIONS, NOTHING, ORDINALS, PLURALS, SOME_OF_IT
from megavlm.data.toy_world.world import COLOURS, COLUMNS, DIGITS, LETTERS, ROWS, SHAPES

_PIECE = re.compile(r"<image>|[A-Z]?[a-z]+|[^a-z]")


def pieces(text: str) -> list[str]:
    """The text cut into the entries of `vocabulary`, image tags and blanks: nothing is lost between them."""
    return _PIECE.findall(text)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every piece that occurs in the toy world: words, single capitals and digits, signs; sorted."""
    captions = (*NOTHING, *(phrase for table in (ALL_OF_IT, SOME_OF_IT) for row in table.values() for phrase in row))
    names = (*SHAPES, *PLURALS.values(), *COLOURS, *ROWS, *COLUMNS, *ORDINALS, *LETTERS, *DIGITS)
    phrases = " ".join((*captions, *INTRODUCTIONS, *FRAGMENTS, *PHRASES, *names, ","))
    return tuple(sorted({piece for piece in pieces(re.sub(r"\{\w+\}", " ", phrases)) if not piece.isspace()}))
