"""MMC4 jsonl: sentences, pictures, and how like each other they are; OpenFlamingo's recipe makes a document.

Pictures that are missing, small or unreadable are left out; the rest are assigned to sentences, each at most once, for
the largest total similarity, and pairs below a threshold dropped. The first six pictures in the order of the list
stay, each directly in front of its sentence, and the pictures come in the order of their tags. OpenFlamingo keeps the
list's order there, which gives tags the wrong pictures where the two orders differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megavlm.data.readers.assignment import assign
from megavlm.data.readers.base import Bad, Context, Reader, Record, kind_of, list_of
from megavlm.data.readers.documents import document
from megavlm.data.readers.json_files import JSON
from megavlm.data.readers.obelics import summary
from megavlm.data.readers.pictures import image_of
from megavlm.data.sample import IMAGE_TAG, Picture, Refusal, Sample

MOST_CELLS = 4_000_000
"""Pictures times sentences of one document."""


def _documents(record: Record, context: Context) -> Iterator[Sample | Refusal]:
    sentences = list_of(record.get("text_list"), "text_list")
    if any(not isinstance(sentence, str) for sentence in sentences):
        raise Bad("wrong type: text_list holds something that is no text")
    if any(IMAGE_TAG in sentence for sentence in sentences):
        raise Bad(f"tags and pictures disagree: the text says {IMAGE_TAG}")
    infos = list_of(record.get("image_info"), "image_info")
    similarity = _matrix(record.get("similarity_matrix"), len(infos), len(sentences))
    left_out: list[str] = []
    pictures = _pictures(infos, context, left_out)
    chosen = _chosen(pictures, similarity, context) if pictures else {}
    if not chosen:
        below = "none is like any sentence" if pictures else "the document has none"
        raise Bad(f"no picture left: {summary(left_out) or below}")
    if len(chosen) == 1 and _share(str(record.get("url")), sentences) >= context.options.single_picture_share:
        raise Bad("one picture only: of such documents a share is kept")
    yield document(list(_pieces(sentences, chosen)), " ", context.options.most_document_pictures)
    if left_out:
        yield Refusal("", f"left out of a document: {summary(left_out)}")


def _matrix(value: object, rows: int, columns: int) -> NDArray[np.float64]:
    """The similarities [pictures, sentences]."""
    if rows * columns > MOST_CELLS:
        raise Bad(f"record too large: {rows} pictures and {columns} sentences")
    lines = list_of(value, "similarity_matrix")
    if len(lines) != rows or any(not isinstance(line, list) or len(line) != columns for line in lines):
        raise Bad(f"lists differ in length: similarity_matrix is not {rows} x {columns}")
    if any(type(number) not in (int, float) for line in lines for number in line):
        raise Bad("wrong type: similarity_matrix holds something that is no number")
    try:
        matrix = np.array(lines, dtype=np.float64).reshape(rows, columns)
    except OverflowError:
        matrix = np.full((1, 1), np.inf)
    if not np.isfinite(matrix).all():
        raise Bad("wrong type: similarity_matrix holds a number that is not finite")
    return matrix


def _pictures(infos: list[object], context: Context, left_out: list[str]) -> dict[int, Picture]:
    """The pictures that are there, large enough and readable, by their place in the list."""
    found = {}
    for place, info in enumerate(infos):
        try:
            picture = _picture(info, context)
        except Bad as bad:
            left_out.append(str(bad))
            continue
        if len(picture.files[0]) // 1000 >= context.options.least_picture_kb:
            found[place] = picture
    return found


def _picture(info: object, context: Context) -> Picture:
    if not isinstance(info, dict):
        raise Bad(f"wrong type: a picture's entry is {kind_of(info)}, not an object")
    if isinstance(info.get("image_base64"), str):
        return image_of("data:;base64," + info["image_base64"], context)
    if not isinstance(info.get("image_name"), str):
        raise Bad("picture missing: its entry has no image_name")
    return image_of(info["image_name"], context)


def _chosen(pictures: dict[int, Picture], similarity: NDArray[np.float64], context: Context) -> dict[int, Picture]:
    """Sentence -> picture, for the first so many pictures that are like enough to their sentence."""
    places = list(pictures)
    matrix = similarity[places]
    pairs = [
        (row, column) for row, column in assign(-matrix) if matrix[row, column] >= context.options.least_similarity
    ]
    return {column: pictures[places[row]] for row, column in pairs[: context.options.most_document_pictures]}


def _pieces(sentences: list[str], chosen: dict[int, Picture]) -> Iterator[str | Picture]:
    for index, sentence in enumerate(sentences):
        if index in chosen:
            yield chosen[index]
        yield sentence


def _share(url: str, sentences: list[str]) -> float:
    """A number in [0, 1) that the document alone decides."""
    content = "\n".join([url, *sentences]).encode(errors="replace")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


MMC4 = Reader("MMC4 jsonl: text_list, image_info, similarity_matrix, and a folder of pictures", JSON, _documents)
