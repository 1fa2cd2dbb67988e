"""Samples of the toy world, by number: captions, documents, conversations, and questions for tests of a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from megavlm.data.sample import IMAGE_TAG, Picture, Sample, Turn
from megavlm.data.toy_world.dice import Dice
from megavlm.data.toy_world.draw import draw, encode
from megavlm.data.toy_world.questions import Question, compare, more_questions, scene_and_question, text_question
from megavlm.data.toy_world.scene import Scene, draw_scene
from megavlm.data.toy_world.text import INTRODUCTIONS, caption
from megavlm.data.toy_world.world import KINDS, Kind, PictureKind, SampleKind, Split, ToyWorld


def toy_samples(
    kind: SampleKind, split: Split, first: int, count: int, world: ToyWorld | None = None
) -> Iterator[Sample]:
    """Samples first ... first + count - 1 of a kind."""
    return (toy_sample(kind, split, number, world) for number in range(first, first + count))


def toy_sample(kind: SampleKind, split: Split, number: int, world: ToyWorld | None = None) -> Sample:
    """One sample: a function of its arguments alone.

    `pairs` are a picture and its caption, `documents` two to four pictures with text behind each, `chat` several
    questions about one picture, `multi_image` one about two or three, and `text` one without a picture.
    """
    world = world or ToyWorld()
    dice = Dice(kind, world.seed, split, number)
    pictures, text, asked = _MAKERS[kind](dice, split, world)
    files = tuple(_picture(scene, world) for scene in pictures)
    return Sample(f"toy-{kind}-{split}-{number:08d}", files, _turns(len(files), asked), text, f"toy-{kind}")


def toy_questions(
    kind: Kind, split: Split, first: int, count: int, world: ToyWorld | None = None
) -> Iterator[tuple[Sample, Question]]:
    """Questions of one kind, each with a conversation of its own, which holds the right answer too."""
    world = world or ToyWorld()
    for number in range(first, first + count):
        scenes, question = _scenes_and_question(Dice("questions", kind, world.seed, split, number), kind, split, world)
        pictures = tuple(_picture(scene, world) for scene in scenes)
        name = f"toy-question-{kind}-{split}-{number:08d}"
        yield Sample(name, pictures, _turns(len(pictures), [question]), source=f"toy-question-{kind}"), question


class Chance(NamedTuple):
    """How often answers are right that are given without looking."""

    constant: float
    """The best one answer to all questions of the kind."""
    by_form: float
    """The best one answer to each form of question."""


def chance_levels(
    split: Split, count: int = 1000, world: ToyWorld | None = None, kinds: Iterable[Kind] = KINDS
) -> dict[Kind, Chance]:
    """The levels for each kind's first questions of the split."""
    world, found = world or ToyWorld(), {}
    for kind in kinds:
        keys = (Dice("questions", kind, world.seed, split, number) for number in range(count))
        found[kind] = _chance([_scenes_and_question(dice, kind, split, world)[1] for dice in keys])
    return found


def _chance(questions: list[Question]) -> Chance:
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.form][question.answer] += 1
    total = Counter[str]()
    for counter in answers.values():
        total.update(counter)
    by_form = sum(max(counter.values()) for counter in answers.values())
    return Chance(max(total.values()) / len(questions), by_form / len(questions))


def _scenes_and_question(dice: Dice, kind: Kind, split: Split, world: ToyWorld) -> tuple[list[Scene], Question]:
    if kind == "compare":
        return compare(dice, split, world)
    if kind == "text":
        return [], text_question(dice, split, world)
    scene, question = scene_and_question(dice, kind, split, world)
    return [scene], question


Parts = tuple[list[Scene], str, list[Question]]
"""Pictures, a document, questions."""


def _pair(dice: Dice, split: Split, world: ToyWorld) -> Parts:
    scene, _ = draw_scene(dice, dice.pick(world.kinds), split, world)
    return [scene], IMAGE_TAG + caption(dice, scene), []


def _document(dice: Dice, split: Split, world: ToyWorld) -> Parts:
    count = dice.between(2, 4)
    text, scenes = dice.pick(INTRODUCTIONS).format(count=count), []
    for number in range(count):
        scene, first = scene_and_question(dice, dice.pick(world.kinds), split, world)
        asked = more_questions(dice, scene, first, dice.below(2), _beside(first, world)) if dice.below(2) else []
        sentences = [caption(dice, scene), *(f"{one.text} {one.answer}." for one in asked)]
        text += (" " if number else "") + IMAGE_TAG + " ".join(sentences)
        scenes.append(scene)
    return scenes, text, []


def _chat(dice: Dice, split: Split, world: ToyWorld) -> Parts:
    scene, first = scene_and_question(dice, dice.pick(world.kinds), split, world)
    return [scene], "", more_questions(dice, scene, first, dice.below(world.questions), _beside(first, world))


def _beside(first: Question, world: ToyWorld) -> list[PictureKind]:
    """What else is asked: counts by colour and form where the picture was drawn for them, for elsewhere all but one in
    ten are 0 or 1, and a model learns to say so."""
    return [kind for kind in world.kinds if kind != "count_by" or first.kind == kind]


def _several(dice: Dice, split: Split, world: ToyWorld) -> Parts:
    scenes, question = compare(dice, split, world)
    return scenes, "", [question]


def _text(dice: Dice, split: Split, world: ToyWorld) -> Parts:
    return [], "", [text_question(dice, split, world)]


_MAKERS: dict[SampleKind, Callable[[Dice, Split, ToyWorld], Parts]] = {
    "pairs": _pair,
    "documents": _document,
    "chat": _chat,
    "multi_image": _several,
    "text": _text,
}


def _turns(pictures: int, asked: list[Question]) -> tuple[Turn, ...]:
    tags = (IMAGE_TAG + "\n") * pictures
    turns = [(Turn("user", one.text), Turn("assistant", one.answer)) for one in asked]
    flat = [turn for pair in turns for turn in pair]
    return (Turn("user", tags + flat[0].text), *flat[1:]) if flat else ()


def _picture(scene: Scene, world: ToyWorld) -> Picture:
    return Picture((encode(draw(scene), world.picture_format),))
