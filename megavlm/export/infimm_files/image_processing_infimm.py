"""From pictures to the pixel values that InfiMM's vision towers were trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class InfiMMImageProcessor(BaseImageProcessor):
    """Resize the shorter side (bicubic), crop the centre, convert to RGB, scale to [0, 1], normalise.

    Each step, its rounding and their order are those of training; the conversion to RGB in particular comes behind
    the resize, which matters for pictures with a palette or with transparency.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers reads it on the class

    def __init__(
        self,
        image_size: int = 336,
        image_mean: tuple[float, ...] = CLIP_MEAN,
        image_std: tuple[float, ...] = CLIP_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images: Any, return_tensors: str = "pt", **_: Any) -> BatchFeature:
        """One picture or a list of them -> pixel_values [n, 3, image_size, image_size]."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors = {return_tensors!r}: only 'pt' is made here")
        pictures = images if isinstance(images, list | tuple) else [images]
        return BatchFeature({"pixel_values": torch.stack([self.pixels(picture) for picture in pictures])})

    def pixels(self, picture: Any) -> Tensor:
        """One picture (PIL, or an array [height, width, 3] of bytes) -> float32 [3, image_size, image_size]."""
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        if not isinstance(picture, Image.Image):
            raise TypeError(f"a picture is a {type(picture).__name__}: pass a PIL image or an array of bytes")
        rgb = np.array(self._square(picture).convert("RGB"))
        pixels = torch.from_numpy(rgb).permute(2, 0, 1).to(torch.float32).div(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    def _square(self, picture: Image.Image) -> Image.Image:
        """The centre of the picture, its shorter side scaled to the image size."""
        size, (width, height) = self.image_size, picture.size
        longer = int(size * max(width, height) / min(width, height))
        width, height = (size, longer) if width <= height else (longer, size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return picture.crop((left, top, left + size, top + size))
