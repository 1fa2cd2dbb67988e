"""From picture files to the pixels that CLIP's vision towers take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from megavlm.data.headers import MOST_PIXELS
from megavlm.errors import DataError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(path: str | Path) -> Image.Image:
    """The decoded picture of a file."""
    try:
        image = Image.open(path)
        if image.width * image.height > MOST_PIXELS:
            raise _too_large(path)
        image.load()
    except FileNotFoundError:
        raise DataError("image", str(path), "there is no such file", "check the path") from None
    except Image.DecompressionBombError:  # PIL's own limit, from the header too
        raise _too_large(path) from None
    except UnidentifiedImageError:
        raise DataError("image", str(path), "is no picture that can be read", "use for example JPEG or PNG") from None
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for damaged files
        raise DataError("image", str(path), f"cannot be read: {error}", "check the file, or copy it again") from None
    return image


def _too_large(path: str | Path) -> DataError:
    return DataError("image", str(path), f"has more than {MOST_PIXELS} pixels", "scale it down")


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """The middle square of a picture, [3, size, size], normalised as CLIP's training did."""
    pixels = torch.from_numpy(np.array(center_square(image, size))).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to `size` (bicubic), then the middle of the long one, then RGB.

    The conversion comes last, as in the original preprocessing: a palette is resized without interpolation, and
    transparent pixels count less in their neighbourhood.
    """
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size)).convert("RGB")
