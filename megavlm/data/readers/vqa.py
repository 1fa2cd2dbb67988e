"""Questions, answers and captions about a picture, as VQA data sets have them in json, with the multi-task prompts.

One list of records, or an object that holds it (TextVQA, DocVQA, ST-VQA), or that names each record by its key (GQA,
OCR-VQA, ScienceQA). Of several people's answers the most frequent one is taken, the first of equals. The answers may
stand in a file of their own (VQAv2, OK-VQA), and a picture may be a number of COCO's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from megavlm.data.readers.base import Bad, Context, Reader, ReadOptions, Record, kind_of, list_of, text_of
from megavlm.data.readers.json_files import JSON, PICTURE_ID
from megavlm.data.readers.pictures import SUFFIXES, images_of
from megavlm.data.readers.vqa_prompts import (
    DESCRIBE,
    LETTERS,
    asks_for_letter,
    choice_prompt,
    may_be_unanswerable,
    question_prompt,
)
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG, Sample, Turn

QUESTIONS = ("question", "questions")
ANSWERS = ("answers", "answer", "direct_answers", "multiple_choice_answer", "label")
CHOICES = ("choices", "options")
RIGHT_CHOICE = ("correct_choice_idx", "correct_choice", "answer")
CAPTIONS = ("caption", "captions", "caption_str", "reference_strs")
PICTURES = ("image", "image_path", "file_path", "image_file", "file_name", "img_path", "image_name")
PICTURE_IDS = (PICTURE_ID, "imageId")
"""Names of pictures whose suffix is left out, as in TextVQA and GQA; or numbers, as in VQAv2."""
FILES_OF_NUMBERS = tuple(
    front + "{:012d}.jpg" for front in ("", "COCO_train2014_", "COCO_val2014_", "COCO_test2015_", "COCO_test2014_")
)
"""What COCO calls the file of a number, by release."""


def _samples(record: Record, context: Context) -> Iterator[Sample]:
    dataset = context.options.dataset or context.dataset
    record = _answered(record, context.options)
    pairs = _captions(record) if _first(record, QUESTIONS) is None else _questions(record, dataset)
    if any(tag in text for pair in pairs for text in pair for tag in (IMAGE_TAG, VIDEO_TAG)):
        raise Bad("tags and pictures disagree: the text says a tag")
    pictures = images_of(_picture(record, context.folder), context)
    front = (IMAGE_TAG + "\n") * len(pictures)
    turns = [turn for prompt, answer in pairs for turn in (Turn("user", prompt), Turn("assistant", answer))]
    yield Sample("", tuple(pictures), (Turn("user", front + turns[0].text), *turns[1:]))


def _answered(record: Record, options: ReadOptions) -> Record:
    """The record, with its answer where that is in another file."""
    if options.annotations is None or _first(record, ANSWERS) is not None:
        return record
    name = record.get("question_id")
    answer = _answers_in(options.annotations, options).get(name) if isinstance(name, int | str) else None
    if answer is None:
        raise Bad(f"no answer: {options.annotations} has none to question_id {name!r}"[:200])
    return {**record, "answer": answer}


@lru_cache(maxsize=2)
def _answers_in(file: str, options: ReadOptions) -> dict[int | str, str]:
    """question_id -> answer."""
    found: dict[int | str, str] = {}
    for entry in JSON.entries(Path(file), options):
        try:
            record = entry()
            name, answer = record.get("question_id"), _most_frequent(_first(record, ANSWERS))
        except Bad:
            continue  # the question will say that it has no answer
        if isinstance(name, int | str):
            found[name] = answer
    return found


def _captions(record: Record) -> list[tuple[str, str]]:
    """One pair of prompt and caption; the first, where a picture has several."""
    caption = _first(record, CAPTIONS)
    if isinstance(caption, list) and caption:
        caption = caption[0]
    if caption is None:
        raise Bad(f"neither question nor caption: the record has only {', '.join(list(record)[:12])}")
    return [(DESCRIBE, text_of(caption, "the caption").strip())]


def _questions(record: Record, dataset: str) -> list[tuple[str, str]]:
    """Pairs of prompt and answer; several, where a picture has a list of questions."""
    question = _first(record, QUESTIONS)
    if isinstance(question, list):
        answers = list_of(_first(record, ANSWERS), "the answers")
        if not question or len(question) != len(answers):
            raise Bad(f"lists differ in length: {len(question)} questions, {len(answers)} answers")
        texts = [text_of(item, "a question").strip() for item in question]
        return [
            (question_prompt(text, dataset), _answer(item, dataset)) for text, item in zip(texts, answers, strict=True)
        ]
    text = text_of(question, "the question").strip()
    choices = _first(record, CHOICES)
    has_words = any(_is_words(record.get(name)) for name in ANSWERS)
    if choices is not None and asks_for_letter(dataset, bool(choices), has_words):
        return [_choice(text, list_of(choices, "the choices"), _first(record, RIGHT_CHOICE))]
    return [(question_prompt(text, dataset), _answer(_first(record, ANSWERS), dataset))]


def _choice(question: str, choices: list[Any], right: Any) -> tuple[str, str]:
    texts = [text_of(choice, "a choice").strip() for choice in choices]
    if isinstance(right, str) and right in texts:
        right = texts.index(right)
    if isinstance(right, str) and len(right) == 1 and right in LETTERS:
        right = LETTERS.index(right)
    if type(right) is not int or not 0 <= right < min(len(texts), len(LETTERS)):
        raise Bad(f"no answer: {right!r} is none of the {len(texts)} choices"[:200])
    return choice_prompt(question, texts), LETTERS[right]


def _answer(value: Any, dataset: str) -> str:
    answer = _most_frequent(value)
    return answer.capitalize() if may_be_unanswerable(dataset) and answer.lower() == "unanswerable" else answer


def _most_frequent(value: Any) -> str:
    """Of a text, a list of texts, or a list of objects with an `answer`."""
    said = []
    for item in value if isinstance(value, list) else [value]:
        text = item.get("answer") if isinstance(item, dict) else item
        if isinstance(text, (int, float)) and not isinstance(text, bool):
            text = str(text)
        said.append(text_of(text, "an answer").strip())
    if not said:
        raise Bad("no answer: the list of answers is empty")
    return Counter(said).most_common(1)[0][0]


def _is_words(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and len(value) > 0)


def _picture(record: Record, folder: Path) -> Any:
    found = _first(record, PICTURES)
    if found is not None:
        return found
    name = _first(record, PICTURE_IDS)
    if name is None:
        raise Bad(f"picture missing: the record names none of {', '.join((*PICTURES, *PICTURE_IDS))}")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise Bad(f"wrong type: the name of a picture is {kind_of(name)}")
    if isinstance(name, int) and 0 <= name < 10**12:
        numbered = (form.format(name) for form in FILES_OF_NUMBERS)
        if (found := next((file for file in numbered if (folder / file).is_file()), None)) is not None:
            return found
    return str(name) if str(name).lower().endswith(SUFFIXES) else f"{name}.jpg"


def _first(record: Record, names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


VQA = Reader(
    "VQA-style json: question, answers, image (or caption, image), with the multi-task prompts", JSON, _samples
)
