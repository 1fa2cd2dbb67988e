"""Answers to the toy world's questions, found by another way: from what a scene lists, or from what a text tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from megavlm.data.toy_world.scene import Chart, Scene, Word


class Facts(NamedTuple):
    """What a picture shows."""

    shapes: list[tuple[str, str, str]]
    """(colour, shape, place)"""
    word: str = ""
    ink: str = ""
    bars: tuple[tuple[str, str, int], ...] = ()
    """(label, colour, value)"""


def facts_of(scene: Scene) -> Facts:
    content = scene.content
    if isinstance(content, Word):
        return Facts([], content.text, content.colour)
    if isinstance(content, Chart):
        return Facts([], bars=tuple((bar.label, bar.colour, bar.value) for bar in content.bars))
    return Facts([(one.colour, one.shape, one.place) for one in content])


def facts_in(story: str) -> Facts:
    """What a complete caption says."""
    shapes = re.findall(r"an? (\w+) (\w+) at the (\w+ \w+)", story, re.IGNORECASE)
    word = re.search(r"(?:word|number) (\w+) in (\w+)", story)
    bars = re.findall(r"(\w) is (\w+) with value (\d)", story)
    bars = bars or [("", *bar) for bar in re.findall(r"(\w+) has value (\d)", story)]
    found = tuple((label, colour, int(value)) for label, colour, value in bars)
    return Facts(shapes, word[1] if word else "", word[2] if word else "", found)


def only(things: list[str]) -> str:
    """The one that there is."""
    assert len(things) == 1, things
    return things[0]


def answer(facts: Facts, question: str) -> str:
    """The answer to a question about one picture; fails unless there is exactly one."""
    for pattern, find in _FINDERS.items():
        if match := re.fullmatch(pattern, question):
            return find(facts, *match.groups())
    raise AssertionError(f"no rule for {question}")


def _relation(facts: Facts, one: str, axis: str, other: str) -> str:
    places = {f"{colour} {shape}": place.split() for colour, shape, place in facts.shapes}
    assert len(places) == len(facts.shapes)
    (row, column), (other_row, other_column) = places[one], places[other]
    order = ["top", "middle", "bottom"] if axis == "above" else ["left", "centre", "right"]
    first, second = (row, other_row) if axis == "above" else (column, other_column)
    assert first != second
    before, after = ("above", "below") if axis == "above" else ("left", "right")
    return before if order.index(first) < order.index(second) else after


def _count(facts: Facts, what: str) -> str:
    if what in ("letters", "digits"):
        assert facts.word.isdigit() == (what == "digits")
        return str(len(facts.word))
    if what == "bars":
        assert all(label for label, _, _ in facts.bars)
        return str(len(facts.bars))
    if what == "shapes":
        return str(len(facts.shapes))
    singular = what.removesuffix("es") if what == "crosses" else what.removesuffix("s")
    return str(sum(what == colour or singular == shape for colour, shape, _ in facts.shapes))


def _extreme(facts: Facts, which: str) -> str:
    wanted = {"highest": max, "lowest": min}[which](value for _, _, value in facts.bars)
    return only([colour for _, colour, value in facts.bars if value == wanted])


def _character(facts: Facts, which: str, noun: str) -> str:
    assert noun == ("digit" if facts.word.isdigit() else "letter")
    return facts.word[{"first": 0, "last": -1}[which]]


def _ink(facts: Facts, noun: str) -> str:
    assert noun == ("number" if facts.word.isdigit() else "word")
    return facts.ink


_FINDERS: dict[str, Callable[..., str]] = {
    r"What colour is the shape at the (\w+ \w+)\?": lambda f, place: only([c for c, _, p in f.shapes if p == place]),
    r"What colour is the (word|number)\?": _ink,
    r"What colour is the (\w+)\?": lambda f, shape: only([c for c, s, _ in f.shapes if s == shape]),
    r"What colour is (\w)\?": lambda f, label: only([c for one, c, _ in f.bars if one == label]),
    r"Which shape is at the (\w+ \w+)\?": lambda f, place: only([s for _, s, p in f.shapes if p == place]),
    r"Which shape is (\w+)\?": lambda f, colour: only([s for c, s, _ in f.shapes if c == colour]),
    r"Where is the (\w+) (\w+)\?": lambda f, colour, shape: only(
        [p for *look, p in f.shapes if look == [colour, shape]]
    ),
    r"Where is the (\w+)\?": lambda f, shape: only([p for _, s, p in f.shapes if s == shape]),
    r"Is the (\w+ \w+) (left|above) or (?:right of|below) the (\w+ \w+)\?": _relation,
    r"How many (\w+)(?: shapes)? are there\?": _count,
    r"What is written\?": lambda f: f.word,
    r"What is the (first|last) (letter|digit)\?": _character,
    r"What is the value of (\w+)\?": lambda f, name: only([str(v) for label, c, v in f.bars if name in (label, c)]),
    r"Which colour has the (highest|lowest) value\?": _extreme,
}
