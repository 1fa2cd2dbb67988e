"""From text and pictures to the inputs of InfiMM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

IMAGE_TOKEN = "<image>"


class InfiMMProcessor(ProcessorMixin):
    """Tokenizer and image processor in one.

    The text has one `<image>` for each picture. `apply_chat_template` writes it for conversations whose user turns
    hold parts like `{"type": "image"}` and `{"type": "text", "text": ...}`.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        **text_kwargs: Any,
    ) -> BatchFeature:
        """One text or a batch of them, and their pictures.

        images: for one text a picture or a list of pictures; for a batch one list for each text, or one list of all
        pictures in the order of their `<image>` tokens. A picture is a PIL image, a path or a URL.
        padding_side: left, as generation wants it; take "right" for training.
        Everything else goes to the tokenizer.

        Returns input_ids and attention_mask [B, T] and, if there are pictures, pixel_values [B, N, 3, size, size]
        with zeros behind the pictures of a sample that has fewer than N.
        """
        if videos is not None or audio is not None:
            raise ValueError("InfiMM reads text and images: leave out videos and audio")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors = {return_tensors!r}: only 'pt' is made here")
        if text is None:
            raise ValueError("text is missing: pass a text with one <image> for each picture")
        texts = [text] if isinstance(text, str) else list(text)
        pictures = self._pictures_of_texts(texts, images)
        for i, (one, its_pictures) in enumerate(zip(texts, pictures, strict=True)):
            if one.count(IMAGE_TOKEN) != len(its_pictures):
                raise ValueError(
                    f"text {i} has {one.count(IMAGE_TOKEN)} {IMAGE_TOKEN} tokens and {len(its_pictures)} images: "
                    f"write {IMAGE_TOKEN} once for each image"
                )
        encoded = self.tokenizer(texts, return_tensors="pt", padding=padding, padding_side=padding_side, **text_kwargs)
        self._check_nothing_was_cut(encoded["input_ids"], pictures)
        pixels = self._pixel_values(pictures)
        return BatchFeature({**encoded, **({} if pixels is None else {"pixel_values": pixels})})

    def _pictures_of_texts(self, texts: list[str], images: Any) -> list[list[Any]]:
        """A list of pictures for each text."""
        if images is None:
            return [[] for _ in texts]
        images = self.image_processor.fetch_images(images)
        images = list(images) if isinstance(images, list | tuple) else [images]
        if any(isinstance(entry, list | tuple) for entry in images):
            if len(images) != len(texts):
                raise ValueError(f"{len(texts)} texts and {len(images)} lists of images: pass one list for each text")
            return [[] if entry is None else list(entry) for entry in images]
        if len(texts) == 1:
            return [images]
        counts = [one.count(IMAGE_TOKEN) for one in texts]
        if sum(counts) != len(images):
            raise ValueError(
                f"the {len(texts)} texts have {sum(counts)} {IMAGE_TOKEN} tokens and there are {len(images)} images: "
                f"write {IMAGE_TOKEN} once for each image"
            )
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in counts]

    def _check_nothing_was_cut(self, input_ids: Tensor, pictures: list[list[Any]]) -> None:
        """Without its `<image>` token a picture would pass for the next one's."""
        for i, (row, its_pictures) in enumerate(zip(input_ids, pictures, strict=True)):
            left = int((row == self.image_token_id).sum())
            if left != len(its_pictures):
                raise ValueError(
                    f"text {i} has {len(its_pictures)} {IMAGE_TOKEN} tokens, and truncation left {left} of them: "
                    "allow a larger max_length, or shorten the text"
                )

    def _pixel_values(self, pictures: list[list[Any]]) -> Tensor | None:
        most = max(map(len, pictures))
        if most == 0:
            return None
        size = self.image_processor.image_size
        pixels = torch.zeros(len(pictures), most, 3, size, size)
        for row, its_pictures in zip(pixels, pictures, strict=True):
            if its_pictures:
                row[: len(its_pictures)] = self.image_processor(its_pictures)["pixel_values"]
        return pixels

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]
