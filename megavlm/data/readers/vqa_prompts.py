"""The prompts of InfiMM's multi-task stage, by the name of the data set.

They are LLaVA-1.5's response formats; the papers don't say what stands between question and prompt, LLaVA has a line
break. Captions have one prompt, the only variant that is published.
"""

from __future__ import annotations

import re

DESCRIBE = "Please describe the image."
ONE_WORD = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def asks_for_letter(dataset: str, has_choices: bool, has_answers: bool) -> bool:
    """Whether the answer is an option's letter: in ScienceQA, and where there are options and no answers in words."""
    return has_choices and ("scienceqa" in _plain(dataset) or not has_answers)


def may_be_unanswerable(dataset: str) -> bool:
    """Whether some questions of the data set have no answer: VizWiz's."""
    return "vizwiz" in _plain(dataset)


def question_prompt(question: str, dataset: str) -> str:
    """A question, and how it is to be answered."""
    lines = [question, UNANSWERABLE] if may_be_unanswerable(dataset) else [question]
    return "\n".join([*lines, ONE_WORD])


def choice_prompt(question: str, choices: list[str]) -> str:
    """A question with its options, to be answered by a letter."""
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *options, LETTER])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
