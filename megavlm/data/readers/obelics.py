"""OBELICS parquet: parallel lists `images` and `texts`, at each place one of the two, in the document's own order.

Pictures are bytes in the parquet (as its downloaders store them), or URLs whose files lie in a folder: under
`host/path` as `wget --force-directories` saves them, or under the SHA-256 or MD5 of the URL, with any suffix or none.
A picture that is missing or no picture is left out of its document, and reported.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from megavlm.data.readers.base import Bad, Context, Reader, Record, kind_of, list_of
from megavlm.data.readers.documents import document
from megavlm.data.readers.parquet_files import PARQUET
from megavlm.data.readers.pictures import SUFFIXES, image_of, path_in
from megavlm.data.sample import IMAGE_TAG, Picture, Refusal, Sample

BETWEEN = "\n\n"


def _documents(record: Record, context: Context) -> Iterator[Sample | Refusal]:
    images, texts = list_of(record.get("images"), "images"), list_of(record.get("texts"), "texts")
    if len(images) != len(texts):
        raise Bad(f"lists differ in length: {len(images)} images, {len(texts)} texts")
    pieces: list[str | Picture] = []
    left_out: list[str] = []
    for image, text in zip(images, texts, strict=True):
        if isinstance(text, str) and IMAGE_TAG in text:
            raise Bad(f"tags and pictures disagree: the text says {IMAGE_TAG}")
        if text is not None and not isinstance(text, str):
            raise Bad(f"wrong type: a text is {kind_of(text)}")
        if text:
            pieces.append(text)
        elif image is not None:
            pieces += _found(image, context, left_out)
    if not any(isinstance(piece, Picture) for piece in pieces):
        raise Bad(f"no picture left: {summary(left_out) or 'the document has none'}")
    yield document(pieces, BETWEEN, context.options.most_document_pictures)
    if left_out:
        yield Refusal("", f"left out of a document: {summary(left_out)}")


def summary(reasons: list[str]) -> str:
    """How many pictures were left out, by the kinds of reasons."""
    kinds = Counter(reason.partition(":")[0] for reason in reasons)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def _found(image: Any, context: Context, left_out: list[str]) -> list[Picture]:
    try:
        if isinstance(image, str) and "://" in image[:12]:
            image = _file_of(image, context)
        return [image_of(image, context)]
    except Bad as bad:
        left_out.append(str(bad))
        return []


def _file_of(url: str, context: Context) -> str:
    """The name in the folder under which the picture of a URL lies."""
    encoded = url.encode(errors="replace")
    stems = [hashlib.sha256(encoded).hexdigest(), hashlib.md5(encoded, usedforsecurity=False).hexdigest()]
    try:
        parts = urlsplit(url)
        stems.append(f"{parts.netloc}{unquote(parts.path)}")
    except ValueError:  # a URL such as http://[
        pass
    for name in (stem + suffix for stem in stems for suffix in ("", *SUFFIXES)):
        if os.path.isfile(path_in(context.folder, name)):
            return name
    raise Bad(f"picture missing: {url[:200]}")


OBELICS = Reader("OBELICS parquet: parallel images (bytes, or URLs of local files) and texts", PARQUET, _documents)
