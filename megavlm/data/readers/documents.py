"""Interleaved documents: texts and pictures in one order, a tag directly in front of the text that follows it."""

from __future__ import annotations

from collections.abc import Sequence

from megavlm.data.readers.base import Bad
from megavlm.data.sample import IMAGE_TAG, Picture, Sample


def document(pieces: Sequence[str | Picture], between: str, most_pictures: int) -> Sample:
    """The document of these pieces; the pictures behind the first so many are left out, their text stays.

    Texts that follow each other are joined by `between`; blanks beside a tag, and at both ends, are stripped.
    """
    text = ""
    pictures: list[Picture] = []
    for piece in pieces:
        if isinstance(piece, Picture):
            if len(pictures) < most_pictures:
                pictures.append(piece)
                text = text.rstrip() + IMAGE_TAG
        elif stripped := piece.strip():
            text += stripped if not text or text.endswith(IMAGE_TAG) else between + stripped
    if len(pictures) == 1 and text.endswith(IMAGE_TAG):
        raise Bad("nothing behind the only picture")
    return Sample("", tuple(pictures), text=text)
