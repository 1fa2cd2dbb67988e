"""What is said of a picture."""

from __future__ import annotations

from megavlm.data.toy_world.dice import Dice
from megavlm.data.toy_world.scene import Chart, Scene, Shape, Word
from megavlm.data.toy_world.world import SHAPES

PLURALS = {shape: shape + ("es" if shape.endswith("ss") else "s") for shape in SHAPES}
ORDINALS = ("first", "second", "third")
NOTHING = ("An empty picture.", "The picture shows nothing.")

ALL_OF_IT = {
    "shapes": ("{first}.", "The picture shows {things}.", "{count}: {things}."),
    "word": ("The {noun} {text} in {colour}.", "The picture shows the {noun} {text} in {colour}."),
    "chart": ("A {kind} chart: {values}.", "The picture shows a {kind} chart: {values}."),
}
"""Captions from which every question about the picture can be answered, its layout aside."""
SOME_OF_IT = {
    "shapes": ("{first_looks}.", "A picture of {looks}."),
    "word": ("It says {text}.", "The {noun} {text}."),
    "chart": ("A {kind} chart of {count}.", "A {kind} chart with {colours}."),
}
INTRODUCTIONS = ("", "Here are {count} pictures. ", "A story in {count} pictures. ")
"""Before the first picture of a document."""
FRAGMENTS = (
    *("a an A An at the and", "{count} shape shapes letters digits", "word number bar bars pie colour colours"),
    *("{label} is {colour} with value {value}", "{colour} has value {value}", "above below left right"),
)
"""What fills the captions and answers, beside the names of things."""


def caption(dice: Dice, scene: Scene, *, complete: bool = False) -> str:
    """A caption; a complete one names everything, others may leave things out."""
    content = scene.content
    if isinstance(content, Word):
        fields = {"noun": word_noun(content), "text": content.text, "colour": content.colour}
        return _phrase(dice, "word", complete).format(**fields)
    if isinstance(content, Chart):
        return _phrase(dice, "chart", complete).format(**_chart_fields(content))
    if not content:
        return dice.pick(NOTHING)
    return _phrase(dice, "shapes", complete).format(**_shape_fields(content))


def _phrase(dice: Dice, kind: str, complete: bool) -> str:
    return dice.pick(ALL_OF_IT[kind] if complete else ALL_OF_IT[kind] + SOME_OF_IT[kind])


def _shape_fields(shapes: tuple[Shape, ...]) -> dict[str, str]:
    things = joined([f"{with_article(one.name)} at the {one.place}" for one in shapes])
    looks = joined([with_article(one.name) for one in shapes])
    fields = {"things": things, "looks": looks, "count": counted(len(shapes), "shape")}
    return fields | {"first": things[0].upper() + things[1:], "first_looks": looks[0].upper() + looks[1:]}


def _chart_fields(chart: Chart) -> dict[str, str]:
    if chart.style == "pie":
        values = [f"{bar.colour} has value {bar.value}" for bar in chart.bars]
        count = counted(len(chart.bars), "colour")
    else:
        values = [f"{bar.label} is {bar.colour} with value {bar.value}" for bar in chart.bars]
        count = counted(len(chart.bars), "bar")
    kind, colours = "pie" if chart.style == "pie" else "bar", joined([bar.colour for bar in chart.bars])
    return {"kind": kind, "values": joined(values), "count": count, "colours": colours}


def word_noun(word: Word) -> str:
    """What a word of letters, or one of digits, is called."""
    return "number" if word.is_number else "word"


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def joined(things: list[str], word: str = "and") -> str:
    """`a, b and c`."""
    return f" {word} ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
