"""Rows as a plan knows them, documents and their pictures by size alone, and the batch that the model would get.

What a row holds decides every shape of a step; what its words and pictures say decides none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megavlm.batch import AttendedMedia, TextBatch, next_token_batch, preceding_images
from megavlm.build.run_config import RunConfig
from megavlm.data.assemble_tables import spliced_batch
from megavlm.tiles import ImagePlan

OwnPictures = Callable[[Sequence[Sequence[int]]], list[tuple[int, ...]]]
"""(tiles of each picture of each row) -> the pictures of each row that a rank encodes."""


@dataclass(frozen=True)
class PlannedDocument:
    """A sample of a row."""

    tokens: int
    """Those of its pictures included."""
    pictures: tuple[ImagePlan, ...] = ()


@dataclass(frozen=True)
class PlannedRow:
    """One microbatch: a packed row, or several equal rows of one document each."""

    documents: tuple[PlannedDocument, ...]
    length: int
    """Tokens, with padding."""
    rows: int = 1
    """More than 1 only of toy text, whose rows are not packed."""

    @property
    def tokens(self) -> int:
        """Of all documents, without padding."""
        return self.rows * sum(document.tokens for document in self.documents)

    @property
    def padded(self) -> int:
        """Tokens of all rows, with padding."""
        return self.rows * self.length

    @property
    def pictures(self) -> tuple[ImagePlan, ...]:
        return tuple(picture for document in self.documents for picture in document.pictures)

    @property
    def tiles(self) -> int:
        """What the tower sees."""
        return sum(picture.tiles for picture in self.pictures)


def batch_of(run: RunConfig, row: PlannedRow, own_pictures: OwnPictures) -> TextBatch:
    """A microbatch of that shape; it holds the patch rows of the pictures that a rank encodes."""
    if run.data is None:
        return next_token_batch(torch.zeros(row.rows, row.length, dtype=torch.int64))
    ends = np.cumsum([document.tokens for document in row.documents])
    padding = [row.length] if not len(ends) or ends[-1] < row.length else []
    cu_seqlens = torch.tensor([0, *ends.tolist(), *padding], dtype=torch.int32)
    if run.infimm is None and run.aquila_vl is None:
        return next_token_batch(torch.zeros(1, row.length, dtype=torch.int64), cu_seqlens=cu_seqlens)
    (held,) = own_pictures([[picture.tiles for picture in row.pictures]])
    patches = _patches(run, [row.pictures[number] for number in held])
    if run.infimm is not None:
        return _attended(run.infimm.image_token_id, row, cu_seqlens, patches, held)
    return _spliced(row, cu_seqlens, patches, held)


def _patches(run: RunConfig, pictures: Sequence[ImagePlan]) -> Tensor:
    """Noise, or in a trace a shape alone."""
    if run.infimm is not None:
        tower = run.infimm.tower
        return torch.randn(len(pictures) * tower.patches, tower.patch_values)
    assert run.aquila_vl is not None
    return torch.randn(sum(picture.patch_rows for picture in pictures), 3 * run.aquila_vl.grid.patch_size**2)


def _attended(
    image_token_id: int, row: PlannedRow, cu_seqlens: Tensor, patches: Tensor, held: tuple[int, ...]
) -> TextBatch:
    """Tags spread evenly over each document."""
    tokens = np.zeros(row.length, np.int64)
    first = 0
    for document in row.documents:
        count = len(document.pictures)
        tokens[first + np.arange(count) * document.tokens // max(count, 1)] = image_token_id
        first += document.tokens
    counts = [len(document.pictures) for document in row.documents]
    counts += [0] * (len(cu_seqlens) - 1 - len(counts))
    rows = torch.from_numpy(tokens).unsqueeze(0)
    image_of_token, has_image = preceding_images(rows, image_token_id, counts, cu_seqlens)
    media = AttendedMedia(patches, (1,) * sum(counts), held, image_of_token=image_of_token, has_image=has_image)
    return replace(next_token_batch(rows, cu_seqlens=cu_seqlens), media=media)


def _spliced(row: PlannedRow, cu_seqlens: Tensor, patches: Tensor, held: tuple[int, ...]) -> TextBatch:
    """Each document's pictures first, then its words."""
    is_image = np.zeros(row.length, np.bool_)
    first = 0
    for document in row.documents:
        is_image[first : first + sum(picture.tokens for picture in document.pictures)] = True
        first += document.tokens
    tokens = torch.zeros(1, row.length, dtype=torch.int64)
    return spliced_batch(tokens, tokens.clone(), is_image, row.pictures, patches, cu_seqlens, held)
