"""The toy world: the same for everyone, held out where it says so, right in what it asks, and visible."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_answers import answer, facts_in, facts_of

from megavlm.data.sample import IMAGE_TAG
from megavlm.data.toy_world.dice import Dice
from megavlm.data.toy_world.draw import draw, parts
from megavlm.data.toy_world.glyphs import glyph
from megavlm.data.toy_world.labels import (
    CHARACTER_CLASSES,
    COLOUR_CLASSES,
    SHAPE_CLASSES,
    labelled_pictures,
    labels,
    toy_scene,
)
from megavlm.data.toy_world.questions import FORMS, compare, is_right, questions_of, scene_and_question, text_question
from megavlm.data.toy_world.samples import chance_levels, toy_questions, toy_sample, toy_samples
from megavlm.data.toy_world.scene import Chart, Scene, Word, draw_scene
from megavlm.data.toy_world.text import caption
from megavlm.data.toy_world.vocabulary import pieces, vocabulary
from megavlm.data.toy_world.world import (
    COLOURS,
    DIGITS,
    FONTS,
    KINDS,
    LETTERS,
    PICTURE_KINDS,
    SAMPLE_KINDS,
    SHAPES,
    SPLITS,
    Split,
    ToyWorld,
    is_held_out_word,
)
from megavlm.errors import ConfigError

WORLD = ToyWorld()
EASY = ToyWorld(most_shapes=2, longest_word=2, places=2)
CROWDED = ToyWorld(places=2)
LARGE = ToyWorld(sizes=((64, 64), (200, 90), (90, 200), (256, 256)), details=(1.0, 0.3))

DIGEST = """
import hashlib
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import SAMPLE_KINDS, SPLITS
samples = [repr(list(toy_samples(kind, split, 5, 8))) for kind in SAMPLE_KINDS for split in SPLITS]
print(hashlib.sha256("".join(samples).encode()).hexdigest())
"""


def scenes(count: int, split: Split = "train", world: ToyWorld = WORLD) -> list[Scene]:
    return [toy_scene(split, number, world) for number in range(count)]


def test_dice_are_splitmix64() -> None:
    dice = Dice()
    dice._state = 1234567
    assert [dice.below(1 << 64) for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_samples_depend_on_seed_split_and_number_alone() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", DIGEST], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
        for seed in ("1", "2")
    ]
    # In this process, other samples were made before, and each of these comes by itself.
    samples = [
        repr([toy_sample(kind, split, number) for number in range(5, 13)]) for kind in SAMPLE_KINDS for split in SPLITS
    ]
    here = hashlib.sha256("".join(samples).encode()).hexdigest()
    assert [run.stdout.decode().strip() for run in runs] == [here, here], runs[0].stderr.decode()


def test_pictures_of_other_seeds_splits_and_numbers_differ() -> None:
    worlds = [WORLD, ToyWorld(seed=1)]
    found = [
        sample.pictures[0].files[0]
        for world in worlds
        for split in SPLITS
        for kind in SAMPLE_KINDS[:3]
        for sample in toy_samples(kind, split, 0, 100, world)
    ]
    assert len(set(found)) > 0.99 * len(found)  # some pictures are empty


@pytest.mark.parametrize("world", [WORLD, EASY, CROWDED, LARGE], ids=["standard", "easy", "crowded", "large"])
@pytest.mark.parametrize("split", SPLITS)
def test_only_one_split_shows_what_is_held_out(split: Split, world: ToyWorld) -> None:
    for kind in PICTURE_KINDS:
        for number in range(120):
            scene, _ = draw_scene(Dice(kind, number), kind, split, world)
            content = scene.content
            if isinstance(content, Word):
                held_out = is_held_out_word(content.text)
            else:
                things = content.bars if isinstance(content, Chart) else content
                held_out = any(thing.is_held_out for thing in things)
            assert held_out == (split == "unseen_combinations"), content


def test_questions_about_combinations_are_about_the_held_out_ones() -> None:
    for number in range(200):
        scene, question = scene_and_question(Dice("about", number), "position", "unseen_combinations", WORLD)
        assert isinstance(scene.content, tuple)
        held_out = [one for one in scene.content if one.is_held_out]
        assert any(one.place == question.answer and one.shape in question.text for one in held_out)


def test_every_shape_colour_and_place_is_trained() -> None:
    found: Counter[str] = Counter()
    for scene in scenes(800):
        if isinstance(scene.content, tuple):
            for one in scene.content:
                found.update((one.shape, one.colour, one.place))
    assert len(found) == len(SHAPES) + len(COLOURS) + 9
    assert min(found.values()) > 0.4 * max(found[colour] for colour in COLOURS)


@pytest.mark.parametrize("world", [WORLD, CROWDED], ids=["standard", "crowded"])
@pytest.mark.parametrize("split", SPLITS)
def test_each_question_of_a_picture_has_one_answer_and_it_is_right(split: Split, world: ToyWorld) -> None:
    for number in range(250):
        scene = toy_scene(split, number, world)
        for kind in PICTURE_KINDS:
            for question in questions_of(scene, kind):
                assert question.kind == kind
                assert question.answer == answer(facts_of(scene), question.text), question


@pytest.mark.parametrize("split", SPLITS)
def test_each_comparison_has_one_answer_and_it_is_right(split: Split) -> None:
    for number in range(250):
        found, question = compare(Dice("compare", number), split, WORLD)
        assert question.answer == compared(found, question.text), question


def compared(found: list[Scene], question: str) -> str:
    ordinals = ["first", "second", "third"]
    if match := re.fullmatch(r"Look at the (\w+) picture\. (.*)", question):
        return answer(facts_of(found[ordinals.index(match[1])]), match[2])
    facts = [facts_of(scene) for scene in found]
    choices = ", ".join(f"the {ordinal}" for ordinal in ordinals[: len(found)])
    assert question.endswith(f": {' or '.join(choices.rsplit(', ', 1))}?")
    if question.startswith("Which picture has the most shapes"):
        counts = [len(one.shapes) for one in facts]
        right = [count == max(counts) for count in counts]
    elif match := re.match(r"Which picture shows the (word|number) (\w+):", question):
        right = [one.word == match[2] and one.word.isdigit() == (match[1] == "number") for one in facts]
    else:
        match = re.match(r"Which picture shows an? (\w+) (\w+):", question)
        assert match
        right = [any((colour, shape) == match.groups() for colour, shape, _ in one.shapes) for one in facts]
    assert sum(right) == 1
    return ordinals[right.index(True)]


@pytest.mark.parametrize("split", SPLITS)
def test_each_text_answers_its_question(split: Split) -> None:
    for number in range(400):
        question = text_question(Dice("text", number), split, WORLD)
        assert question.answer == answered_by_text(question.text), question


def answered_by_text(text: str) -> str:
    if match := re.fullmatch(r"What is (\d+) (plus|minus) (\d+)\?", text):
        return str(int(match[1]) + int(match[3]) * (1 if match[2] == "plus" else -1))
    if match := re.fullmatch(r"Which is larger: (\d+) or (\d+)\?", text):
        return str(max(int(match[1]), int(match[2])))
    if match := re.fullmatch(r"How many characters does (\w+) have\?", text):
        return str(len(match[1]))
    if match := re.fullmatch(r"What is (\w+) backwards\?", text):
        return "".join(reversed(match[1]))
    if match := re.fullmatch(r"Repeat (\w+)\.", text):
        return match[1]
    if match := re.fullmatch(r"Which comes (\w+): (.*)\?", text):
        return re.findall(r"\b(?!or)\w+|orange", match[2])[["first", "second", "third"].index(match[1])]
    story, _, question = text.rpartition(". ")
    return answer(facts_in(story), question)


def test_captions_say_what_is_there() -> None:
    for number, scene in enumerate(scenes(300)):
        facts, told = facts_of(scene), facts_in(caption(Dice(number), scene, complete=True))
        bars = tuple(bar if told.bars and told.bars[0][0] else ("", *bar[1:]) for bar in facts.bars)
        assert (told.shapes, told.word, told.ink, told.bars) == (facts.shapes, facts.word, facts.ink, bars)


@pytest.mark.parametrize("kind", SAMPLE_KINDS)
def test_samples_are_whole(kind: Any) -> None:
    samples = list(toy_samples(kind, "train", 0, 60, LARGE))
    assert len({sample.id for sample in samples}) == 60
    for sample in samples:
        assert sample.tags == len(sample.pictures)
        assert bool(sample.text) == (kind in ("pairs", "documents")) and bool(sample.turns) != bool(sample.text)
        assert [turn.role for turn in sample.turns] == ["user", "assistant"] * (len(sample.turns) // 2)
        for picture in sample.pictures:
            (file,) = picture.files
            assert Image.open(io.BytesIO(file)).size in LARGE.sizes
    counts = {len(sample.pictures) for sample in samples}
    assert counts == {"pairs": {1}, "documents": {2, 3, 4}, "chat": {1}, "multi_image": {2, 3}, "text": {0}}[kind]


def test_a_conversation_asks_several_things_and_none_twice() -> None:
    asked = [[turn.text for turn in sample.turns[::2]] for sample in toy_samples("chat", "train", 0, 200)]
    assert {len(texts) for texts in asked} == set(range(1, WORLD.questions + 1))
    assert all(len({text.removeprefix(IMAGE_TAG + "\n") for text in texts}) == len(texts) for texts in asked)


def test_jpeg_pictures_show_the_same() -> None:
    png = toy_sample("pairs", "train", 3).pictures[0].files[0]
    jpeg = toy_sample("pairs", "train", 3, ToyWorld(picture_format="jpeg")).pictures[0].files[0]
    one, other = (np.asarray(Image.open(io.BytesIO(file)), dtype=int) for file in (png, jpeg))
    assert Image.open(io.BytesIO(jpeg)).format == "JPEG" and np.abs(one - other).mean() < 5


def test_every_form_of_question_and_every_word_occurs() -> None:
    forms, found = set(), set()
    for kind in KINDS:
        for sample, question in toy_questions(kind, "train", 0, 250):
            forms.add(question.form)
            found.update(pieces(sample.turns[0].text + " " + sample.turns[1].text))
    for sample in toy_samples("documents", "train", 0, 150):
        found.update(pieces(sample.text))
    # What a whole conversation adds: questions of other kinds than the one that the picture was made for.
    for sample in toy_samples("chat", "train", 0, 300):
        found.update(piece for turn in sample.turns for piece in pieces(turn.text))
    missing = FORMS.keys() - forms
    assert missing <= {"colour of word", "colour of bar", "count of characters", "count of bars"}
    assert found - {" ", "\n", IMAGE_TAG} == set(vocabulary())


def test_pieces_lose_nothing() -> None:
    text = "<image>\nWhat is KLM? An orange 12, A is red."
    assert "".join(pieces(text)) == text
    assert pieces("What is KL 12?") == ["What", " ", "is", " ", "K", "L", " ", "1", "2", "?"]


def test_chance_levels_are_those_of_the_questions() -> None:
    levels = chance_levels("unseen_pictures", 200, kinds=("relation", "count"))
    for kind, chance in levels.items():
        questions = [question for _, question in toy_questions(kind, "unseen_pictures", 0, 200)]
        best = max(Counter(question.answer for question in questions).values())
        assert chance.constant == best / 200
    # Half of the relations ask left or right: who knows the form is right in at least half.
    assert levels["relation"].constant < 0.4 < 0.5 <= levels["relation"].by_form < 0.6
    assert levels["count"].by_form == levels["count"].constant


@pytest.mark.parametrize("split", SPLITS)
def test_no_one_answer_is_right_often(split: Split) -> None:
    most = {"relation": 0.35, "compare": 0.4, "count": 0.34}
    for kind, chance in chance_levels(split, 300).items():
        assert chance.constant < most.get(kind, 0.3), kind


@pytest.mark.parametrize("world", [WORLD, CROWDED, LARGE], ids=["standard", "crowded", "large"])
def test_everything_drawn_is_visible_in_its_colour(world: ToyWorld) -> None:
    """Inside the picture, large enough, of the colour that is nearest to its name, and over nothing else."""
    palette = np.array(list(COLOURS.values()), dtype=float)
    for scene in scenes(250, world=world):
        pixels, used = np.asarray(draw(scene), dtype=float), np.zeros((scene.height, scene.width), dtype=bool)
        for part in parts(scene):
            mask = np.asarray(part.mask)
            height, width = mask.shape
            assert part.left >= 0 and part.left + width <= scene.width and part.top >= 0
            assert part.top + height <= scene.height
            place = (slice(part.top, part.top + height), slice(part.left, part.left + width))
            assert not (used[place] & (mask > 0)).any() or part.shape == "pie"  # parts of a pie touch
            used[place] |= mask > 0
            assert (mask >= 128).sum() >= (7 if part.character else 40)
            ink = pixels[place][mask >= 200].mean(0)
            assert list(COLOURS)[np.linalg.norm(palette - ink, axis=1).argmin()] == part.colour
            assert np.linalg.norm(ink - scene.background.colour) > 120


def test_fonts_and_characters_look_different() -> None:
    """Masks scaled to one size share too little ink to be mistaken for each other."""
    looks = {
        (character, font): np.asarray(glyph(character, font, 20).resize((14, 20)), dtype=float) / 255
        for character in LETTERS + DIGITS
        for font in FONTS
    }
    for font in FONTS:
        for one, other in combinations(LETTERS + DIGITS, 2):
            assert np.abs(looks[one, font] - looks[other, font]).mean() > 0.05, (one, other, font)
    for one, other in combinations(FONTS, 2):
        distances = [np.abs(looks[character, one] - looks[character, other]).mean() for character in "AEHKMR2358"]
        assert np.mean(distances) > 0.08, (one, other)


def test_a_character_that_stands_out_below_its_picture_is_labelled_as_far_as_it_shows() -> None:
    scene = draw_scene(Dice(0), "reading", "train", ToyWorld())[0]
    low = dataclasses.replace(scene, content=Word("77", "bold", "red", 20, 8, 50))
    found = labels(low, (8, 8))
    assert (found.character[7] == CHARACTER_CLASSES.index("7")).any() or (found.character[6] > 0).any()
    assert not found.character[:6].any()


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
def test_labels_name_what_covers_most_of_a_patch(grid: tuple[int, int]) -> None:
    rows, columns = grid
    for scene in scenes(60, world=LARGE):
        found = labels(scene, grid)
        for row in range(rows):
            for column in range(columns):
                top, bottom = -(-row * scene.height // rows), -(-(row + 1) * scene.height // rows)
                left, right = -(-column * scene.width // columns), -(-(column + 1) * scene.width // columns)
                classes = patch_classes(scene, (left, top, right, bottom))
                here = [int(kind[row, column]) for kind in found]
                named = (COLOUR_CLASSES[here[0]], SHAPE_CLASSES[here[1]], CHARACTER_CLASSES[here[2]])
                assert named in classes


def patch_classes(scene: Scene, box: tuple[int, int, int, int]) -> list[tuple[str, str, str]]:
    """What covers most of the patch; several where they cover it alike."""
    owners = Image.new("L", (scene.width, scene.height))
    drawn = list(parts(scene))
    for number, part in enumerate(drawn, 1):
        owners.paste(number, (part.left, part.top), part.mask.point(lambda level: 255 * (level >= 128)))
    covered = Counter(np.asarray(owners.crop(box)).ravel().tolist())
    area = sum(covered.values())
    covered.pop(0, None)
    best = max(covered.values(), default=0)
    if best * 16 < area:
        return [("background", "none", "none")]
    winners = [drawn[number - 1] for number, count in covered.items() if count == best]
    return [(one.colour, one.shape or "none", one.character or "none") for one in winners]


def test_labelled_pictures_are_the_scenes() -> None:
    found = labelled_pictures("train", 7, 5, (8, 8))
    assert found.pixels.shape == (5, 64, 64, 3) and found.labels.character.shape == (5, 8, 8)
    scene = toy_scene("train", 9, WORLD)
    assert (found.pixels[2] == np.asarray(draw(scene))).all()
    assert all((ours[2] == theirs).all() for ours, theirs in zip(found.labels, labels(scene, (8, 8)), strict=True))


def test_settings_keep_pictures_simple() -> None:
    for scene in scenes(200, world=EASY):
        if isinstance(scene.content, Word):
            assert len(scene.content.text) == 2
        elif isinstance(scene.content, tuple):
            assert len(scene.content) <= 2 and all({one.row, one.column} <= {0, 2} for one in scene.content)
    only_reading = scenes(20, world=ToyWorld(kinds=("reading",)))
    assert all(isinstance(scene.content, Word) for scene in only_reading)


@pytest.mark.parametrize(
    ("given", "expected", "is_so"),
    [
        ("red", "red", True),
        (" Red. ", "red", True),
        ("top  left", "top left", True),
        ("klm", "KLM", True),
        ("red .", "red", True),
        ("red circle", "red", False),
        ("", "red", False),
        ("1", "10", False),
        ("3..", "3", False),
    ],
)
def test_is_right(given: str, expected: str, is_so: bool) -> None:
    assert is_right(given, expected) is is_so


@pytest.mark.parametrize(
    "settings",
    [
        {"sizes": ()},
        {"sizes": ((64,),)},
        {"sizes": ((64, 32),)},
        {"details": ()},
        {"details": (0.0,)},
        {"kinds": ()},
        {"kinds": ("smell",)},
        {"questions": 0},
        {"most_shapes": 5},
        {"longest_word": 1},
        {"places": 4},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ToyWorld(**settings)


def test_counts_by_colour_and_form_are_asked_where_there_is_something_to_count() -> None:
    """Asked of any picture, 88 in 100 of them are 0 or 1."""
    counts = re.compile(r"How many (?!shapes|letters|digits|bars)(.*) are there\?")
    asked = [
        answer.text
        for sample in toy_samples("chat", "train", 0, 600, ToyWorld(questions=10))
        for question, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True)
        if counts.search(question.text)
    ]
    assert len(asked) > 60 and sum(int(one) > 1 for one in asked) / len(asked) > 0.2
