"""Questions that have exactly one right answer, given the picture, the pictures, or their own text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from megavlm.data.toy_world.dice import Dice
from megavlm.data.toy_world.scene import Alike, Chart, Scene, Shape, Word, draw_scene, toy_word
from megavlm.data.toy_world.text import ORDINALS, PLURALS, caption, joined, with_article, word_noun
from megavlm.data.toy_world.world import COLOURS, Kind, PictureKind, Split, ToyWorld, is_held_out_word

FORMS = {
    "colour of shape": "What colour is the {shape}?",
    "colour at place": "What colour is the shape at the {place}?",
    "colour of word": "What colour is the {noun}?",
    "colour of bar": "What colour is {label}?",
    "shape of colour": "Which shape is {colour}?",
    "shape at place": "Which shape is at the {place}?",
    "place of look": "Where is the {name}?",
    "place of shape": "Where is the {shape}?",
    "left or right": "Is the {name} left or right of the {other}?",
    "above or below": "Is the {name} above or below the {other}?",
    "count": "How many shapes are there?",
    "count of characters": "How many {characters} are there?",
    "count of bars": "How many bars are there?",
    "count of colour": "How many {colour} shapes are there?",
    "count of shape": "How many {shapes} are there?",
    "word": "What is written?",
    "first character": "What is the first {character}?",
    "last character": "What is the last {character}?",
    "value of label": "What is the value of {label}?",
    "value of colour": "What is the value of {colour}?",
    "highest": "Which colour has the highest value?",
    "lowest": "Which colour has the lowest value?",
    "which shows": "Which picture shows {thing}: {choices}?",
    "which has most": "Which picture has the most shapes: {choices}?",
    "in one of several": "Look at the {ordinal} picture. {question}",
    "sum": "What is {one} plus {other}?",
    "difference": "What is {one} minus {other}?",
    "larger": "Which is larger: {one} or {other}?",
    "length": "How many characters does {word} have?",
    "backwards": "What is {word} backwards?",
    "repeat": "Repeat {word}.",
    "place in list": "Which comes {ordinal}: {things}?",
    "story": "{story} {question}",
}
"""How each form of question is worded."""
PHRASES = (*FORMS.values(), "letter digit letters digits", "the or")
"""Every word of the questions, beside the names of things."""


class Question(NamedTuple):
    """A question and its one right answer."""

    kind: Kind
    form: str
    """Its wording, names aside: one of `FORMS`."""
    text: str
    answer: str


def is_right(answer_text: str, expected: str) -> bool:
    """Whether an answer is the expected one; case, blanks around and between words, and a final dot do not count."""
    return _plain(answer_text) == _plain(expected)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold().removesuffix(".").rstrip()


def _ask(kind: Kind, form: str, answer: str, **names: str) -> Question:
    return Question(kind, form, FORMS[form].format(**names), answer)


def _unique(shapes: Sequence[Shape], *, colour: str = "", shape: str = "") -> bool:
    return sum(one.colour == colour or one.shape == shape for one in shapes) == 1


def questions_of(scene: Scene, kind: PictureKind) -> list[Question]:
    """All questions of this kind that the scene answers."""
    content = scene.content
    if isinstance(content, Word):
        return list(_of_word(content, kind))
    if isinstance(content, Chart):
        return list(_of_chart(content, kind))
    ask = _OF_SHAPES.get(kind)
    return list(ask(content, _asked_about(content))) if ask else []


def _asked_about(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Those in held-out combinations, where there are any."""
    return tuple(one for one in shapes if one.is_held_out) or shapes


def _colours(shapes: tuple[Shape, ...], asked: tuple[Shape, ...]) -> Iterator[Question]:
    for one in asked:
        yield _ask("colour", "colour at place", one.colour, place=one.place)
        if _unique(shapes, shape=one.shape):
            yield _ask("colour", "colour of shape", one.colour, shape=one.shape)


def _shapes(shapes: tuple[Shape, ...], asked: tuple[Shape, ...]) -> Iterator[Question]:
    for one in asked:
        yield _ask("shape", "shape at place", one.shape, place=one.place)
        if _unique(shapes, colour=one.colour):
            yield _ask("shape", "shape of colour", one.shape, colour=one.colour)


def _positions(shapes: tuple[Shape, ...], asked: tuple[Shape, ...]) -> Iterator[Question]:
    for one in asked:
        yield _ask("position", "place of look", one.place, name=one.name)
        if _unique(shapes, shape=one.shape):
            yield _ask("position", "place of shape", one.place, shape=one.shape)


def _relations(shapes: tuple[Shape, ...], asked: tuple[Shape, ...]) -> Iterator[Question]:
    for one in asked:
        for other in shapes:
            names = {"name": one.name, "other": other.name}
            if one.column != other.column:
                yield _ask("relation", "left or right", "left" if one.column < other.column else "right", **names)
            if one.row != other.row:
                yield _ask("relation", "above or below", "above" if one.row < other.row else "below", **names)


def _counts(shapes: tuple[Shape, ...], asked: tuple[Shape, ...]) -> Iterator[Question]:
    yield _ask("count", "count", str(len(shapes)))


def _counts_by(shapes: tuple[Shape, ...], asked: tuple[Shape, ...]) -> Iterator[Question]:
    yield from (count_of(shapes, Alike(colour, "", 0)) for colour in COLOURS)
    yield from (count_of(shapes, Alike("", shape, 0)) for shape in PLURALS)


_OF_SHAPES: dict[PictureKind, Callable[[tuple[Shape, ...], tuple[Shape, ...]], Iterator[Question]]] = {
    "colour": _colours,
    "shape": _shapes,
    "position": _positions,
    "relation": _relations,
    "count": _counts,
    "count_by": _counts_by,
}


def count_of(shapes: tuple[Shape, ...], alike: Alike) -> Question:
    """How many have this colour, or this form."""
    count = str(sum(one.colour == alike.colour or one.shape == alike.shape for one in shapes))
    if alike.colour:
        return _ask("count_by", "count of colour", count, colour=alike.colour)
    return _ask("count_by", "count of shape", count, shapes=PLURALS[alike.shape])


def _of_word(word: Word, kind: PictureKind) -> Iterator[Question]:
    character = "digit" if word.is_number else "letter"
    if kind == "colour":
        yield _ask("colour", "colour of word", word.colour, noun=word_noun(word))
    elif kind == "count":
        yield _ask("count", "count of characters", str(len(word.text)), characters=character + "s")
    elif kind == "reading":
        yield _ask("reading", "word", word.text)
    elif kind == "character":
        yield _ask("character", "first character", word.text[0], character=character)
        yield _ask("character", "last character", word.text[-1], character=character)


def _of_chart(chart: Chart, kind: PictureKind) -> Iterator[Question]:
    has_labels = chart.style != "pie"
    if kind == "colour" and has_labels:
        yield from (_ask("colour", "colour of bar", bar.colour, label=bar.label) for bar in chart.bars)
    elif kind == "count" and has_labels:
        yield _ask("count", "count of bars", str(len(chart.bars)))
    elif kind == "chart":
        for bar in [bar for bar in chart.bars if bar.is_held_out] or chart.bars:
            yield _ask("chart", "value of colour", str(bar.value), colour=bar.colour)
            if has_labels:
                yield _ask("chart", "value of label", str(bar.value), label=bar.label)
        for form, extreme in (("highest", max), ("lowest", min)):
            value = extreme(bar.value for bar in chart.bars)
            found = [bar.colour for bar in chart.bars if bar.value == value]
            if len(found) == 1:
                yield _ask("chart", form, found[0])


def pick_question(dice: Dice, choices: Sequence[Question]) -> Question:
    """One of these: forms come equally often, and then answers."""
    form = dice.pick(list(dict.fromkeys(one.form for one in choices)))
    answer = dice.pick(list(dict.fromkeys(one.answer for one in choices if one.form == form)))
    return dice.pick([one for one in choices if (one.form, one.answer) == (form, answer)])


def scene_and_question(dice: Dice, kind: PictureKind, split: Split, world: ToyWorld) -> tuple[Scene, Question]:
    """A picture, and a question of this kind about it."""
    scene, alike = draw_scene(dice, kind, split, world)
    if alike is not None:
        assert isinstance(scene.content, tuple)
        return scene, count_of(scene.content, alike)
    return scene, pick_question(dice, questions_of(scene, kind))


def more_questions(
    dice: Dice, scene: Scene, first: Question, count: int, kinds: Iterable[PictureKind]
) -> list[Question]:
    """The first and up to `count` others of these kinds about the scene, in random order."""
    asked = [first]
    choices = {kind: questions_of(scene, kind) for kind in dict.fromkeys(kinds)}
    for _ in range(count):
        left = {kind: found for kind in choices if (found := [one for one in choices[kind] if one not in asked])}
        if left:
            asked.append(pick_question(dice, left[dice.pick(list(left))]))
    return dice.several(asked, len(asked))


def compare(dice: Dice, split: Split, world: ToyWorld) -> tuple[list[Scene], Question]:
    """Two or three pictures, and a question about which is which, or about one of them."""
    while True:
        count = dice.between(2, 3)
        form = dice.pick(("which shows", "which shows", "which has most", "in one of several"))
        kind: PictureKind = "reading" if form == "which shows" and dice.below(4) == 0 else "shape"
        if form == "in one of several":
            kind = dice.pick(world.kinds)
        drawn = [scene_and_question(dice, kind, split, world) for _ in range(count)]
        scenes, chosen = [scene for scene, _ in drawn], dice.below(count)
        question = _comparison(dice, form, scenes, chosen, drawn[chosen][1])
        if question is not None:
            return scenes, question


def _comparison(dice: Dice, form: str, scenes: list[Scene], chosen: int, inner: Question) -> Question | None:
    """The question whose answer is about the chosen picture, if it has one answer."""
    ordinals = ORDINALS[: len(scenes)]
    choices = joined([f"the {ordinal}" for ordinal in ordinals], "or")
    if form == "in one of several":
        return _ask("compare", form, inner.answer, ordinal=ordinals[chosen], question=inner.text)
    if form == "which has most":
        counts = [len(scene.content) for scene in scenes if isinstance(scene.content, tuple)]
        is_unique = counts[chosen] == max(counts) and counts.count(max(counts)) == 1
        return _ask("compare", form, ordinals[chosen], choices=choices) if is_unique else None
    shown = [_shown(scene) for scene in scenes]
    others = {name for number, names in enumerate(shown) if number != chosen for name in names}
    content = scenes[chosen].content
    names = shown[chosen] if isinstance(content, Word) else [with_article(one.name) for one in _asked(content)]
    left = [name for name in names if name not in others]
    return _ask("compare", form, ordinals[chosen], thing=dice.pick(left), choices=choices) if left else None


def _asked(content: tuple[Shape, ...] | Chart) -> tuple[Shape, ...]:
    assert isinstance(content, tuple)
    return _asked_about(content)


def _shown(scene: Scene) -> list[str]:
    content = scene.content
    if isinstance(content, Word):
        return [f"the {word_noun(content)} {content.text}"]
    assert isinstance(content, tuple)
    return [with_article(one.name) for one in content]


def text_question(dice: Dice, split: Split, world: ToyWorld) -> Question:
    """A question that its own text answers: half of them tell what a picture would show."""
    if dice.below(2):
        scene, inner = scene_and_question(dice, dice.pick(world.kinds), split, world)
        story = caption(dice, scene, complete=True)
        return _ask("text", "story", inner.answer, story=story, question=inner.text)
    while True:
        question = _plain_question(dice, split, world)
        holds_word = question.form in ("length", "backwards", "repeat")
        if holds_word or is_held_out_word(question.text) == (split == "unseen_combinations"):
            return question


def _plain_question(dice: Dice, split: Split, world: ToyWorld) -> Question:
    form = dice.pick(("sum", "difference", "larger", "length", "backwards", "repeat", "place in list"))
    if form in ("length", "backwards", "repeat"):
        word = toy_word(dice, split, world.longest_word)
        return _ask("text", form, {"length": str(len(word)), "backwards": word[::-1], "repeat": word}[form], word=word)
    if form == "place in list":
        things = dice.several(tuple(COLOURS), 3)
        number = dice.below(3)
        return _ask("text", form, things[number], ordinal=ORDINALS[number], things=joined(things, "or"))
    low, high = sorted((dice.below(10), dice.below(10))) if form != "larger" else sorted(dice.several(range(100), 2))
    one, other = (high, low) if form == "difference" or dice.below(2) else (low, high)
    answer = {"sum": one + other, "difference": one - other, "larger": high}[form]
    return _ask("text", form, str(answer), one=str(one), other=str(other))
