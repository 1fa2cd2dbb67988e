"""Questions about unseen pictures, put to an exported folder through transformers alone, as its users would."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionProcessor,
)

from megavlm.data.sample import Sample
from megavlm.data.toy_world.questions import Question, is_right
from megavlm.data.toy_world.samples import chance_levels, toy_questions
from megavlm.data.toy_world.world import PictureKind, Split, ToyWorld

HELD_OUT: tuple[Split, ...] = ("unseen_pictures", "unseen_combinations")
LONGEST_ANSWER = 8
"""Tokens."""


@dataclass(frozen=True)
class Asked:
    """A question about a picture, and what was answered."""

    question: Question
    picture: Image.Image
    answer: str

    @property
    def is_right(self) -> bool:
        return is_right(self.answer, self.question.answer)


@dataclass(frozen=True)
class Score:
    """Shares of right answers to one kind of question, each between 0 and 1."""

    chance: float
    """Of whoever knows the questions and the most frequent answer to each form of them."""
    without: float
    """Of the model without a picture."""
    shuffled: float
    """Of the model with the picture of another question."""
    unseen_pictures: float
    """Of the model, with pictures drawn like those of training."""
    unseen_combinations: float
    """Of the model, with things combined as training never shows them."""

    @property
    def held_out(self) -> float:
        """Of the model, over all unseen pictures, which come equally of both kinds."""
        return (self.unseen_pictures + self.unseen_combinations) / 2


class PictureProcessor(LlavaOnevisionProcessor):
    """transformers' processor for Aquila-VL without its half for videos, for which alone it wants torchvision."""

    # from_pretrained looks at these names for what the processor consists of, and for what it may pass on.
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str = "anyres_max_9",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            vision_aspect_ratio=vision_aspect_ratio,
            chat_template=chat_template,
        )


class Respondent:
    """A model that transformers has loaded from a folder."""

    def __init__(self, folder: Path) -> None:
        # The folder's code is what the export before has written; Aquila-VL's is a part of transformers.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self._is_aquila_vl = config.model_type == "llava_onevision"
        processor: Any = PictureProcessor if self._is_aquila_vl else AutoProcessor
        model: Any = AutoModelForImageTextToText if self._is_aquila_vl else AutoModelForCausalLM
        self.processor = processor.from_pretrained(folder, trust_remote_code=True)
        self.model = model.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()

    def answers(self, questions: Sequence[str], pictures: Sequence[Image.Image] | None) -> list[str]:
        """The answer to each question about its picture, or to the questions alone."""
        inputs = self.inputs(questions, pictures)
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        new = tokens[:, inputs["input_ids"].size(1) :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def inputs(self, questions: Sequence[str], pictures: Sequence[Image.Image] | None) -> Mapping[str, torch.Tensor]:
        """What the model is given, up to where its answers begin."""
        image = [] if pictures is None else [{"type": "image"}]
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [*image, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        images = None if pictures is None else [[picture] for picture in pictures]
        padded = {"padding": True, "padding_side": "left", "return_tensors": "pt"} if self._is_aquila_vl else {}
        inputs: Mapping[str, torch.Tensor] = self.processor(images=images, text=texts, **padded)
        return inputs


def quiz(
    model: Respondent, kinds: Sequence[PictureKind], world: ToyWorld, count: int = 100
) -> tuple[dict[PictureKind, Score], list[Asked]]:
    """Each kind's score over `count` questions of either sort of unseen pictures; and all that was asked."""
    scores, asked = {}, []
    for kind in kinds:
        found = {split: _answered(model, kind, split, world, count) for split in HELD_OUT}
        share = {split: _share(one.is_right for one in answers) for split, answers in found.items()}
        everything = [one for answers in found.values() for one in answers]
        scores[kind] = Score(
            chance=_chance(kind, world),
            without=_without_picture(model, everything),
            shuffled=_with_another(model, everything),
            unseen_pictures=share["unseen_pictures"],
            unseen_combinations=share["unseen_combinations"],
        )
        asked += everything
    return scores, asked


def _answered(model: Respondent, kind: PictureKind, split: Split, world: ToyWorld, count: int) -> list[Asked]:
    drawn = [(question, _picture(sample)) for sample, question in toy_questions(kind, split, 0, count, world)]
    answers = model.answers([question.text for question, _ in drawn], [picture for _, picture in drawn])
    return [Asked(question, picture, answer) for (question, picture), answer in zip(drawn, answers, strict=True)]


def _picture(sample: Sample) -> Image.Image:
    return Image.open(io.BytesIO(sample.pictures[0].files[0])).convert("RGB")


def _without_picture(model: Respondent, asked: Sequence[Asked]) -> float:
    answers = model.answers([one.question.text for one in asked], None)
    return _share(is_right(answer, one.question.answer) for answer, one in zip(answers, asked, strict=True))


def _with_another(model: Respondent, asked: Sequence[Asked]) -> float:
    """With the picture of the question before: of the same kind, so only what it shows is wrong."""
    pictures = [one.picture for one in asked]
    answers = model.answers([one.question.text for one in asked], [*pictures[-1:], *pictures[:-1]])
    return _share(is_right(answer, one.question.answer) for answer, one in zip(answers, asked, strict=True))


def _chance(kind: PictureKind, world: ToyWorld) -> float:
    levels = [chance_levels(split, 500, world, [kind])[kind].by_form for split in HELD_OUT]
    return sum(levels) / len(levels)


def _share(right: Any) -> float:
    found = list(right)
    return sum(found) / len(found)


def mean(scores: Mapping[PictureKind, Score], name: str) -> float:
    """Over the kinds."""
    return sum(getattr(score, name) for score in scores.values()) / len(scores)
