"""How each family reads a sample: words to tokens, pictures to tiles and the tokens they cost, samples to a row.

What a sample costs and which pictures it has is known from the index alone (`Pictures`); the words decide nothing of
it. So all ranks agree on the shape of a row, whatever any of them finds in the files.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megavlm.batch import IGNORED, AttendedMedia, TextBatch, next_token_batch, preceding_images
from megavlm.data.assemble_tables import spliced_batch
from megavlm.data.chat import ChatConfig, Encoded, encode_chat
from megavlm.data.documents import encode_document
from megavlm.data.index import Pictures
from megavlm.data.sample import Sample
from megavlm.data.splice import Medium, SplicedSample, cut_sample, pack_samples, spliced_sample
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.video import FrameSampling, sample_frames
from megavlm.errors import DataError
from megavlm.tiles import GridConfig, ImagePlan, Ints, MediaKind, plan_image, tile_counts, token_counts


class Cost(NamedTuple):
    """What pictures cost, per sample."""

    tokens: Ints
    """Beside the tokens of the words, each tag counted among these."""
    tiles: Ints
    """What the tower sees."""
    uncut: Ints
    """Tokens that no cut may take."""


@dataclass(frozen=True)
class PlannedPicture:
    """A picture of a sample: the files it is read from, and what becomes of it."""

    files: tuple[int, ...]
    """Places among the sample's files."""
    plan: ImagePlan
    """How it is cut; of InfiMM's, whose tower takes the middle square, one tile."""

    @property
    def tiles(self) -> int:
        return self.plan.tiles


@dataclass(frozen=True)
class Document:
    """A sample of a row."""

    tokens: Ints
    """[T], the tokens of pictures at full length."""
    targets: Ints
    """[T]: the token itself where it is trained, else IGNORED."""
    pictures: tuple[PlannedPicture, ...]


class Words:
    """How a sample's words become tokens: what an index of token counts is made for."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatConfig) -> None:
        self.tokenizer, self.chat = tokenizer, chat

    @cached_property
    def hash(self) -> str:
        """Tells tokenizers and templates apart: token counts are valid for one alone."""
        settings = json.dumps(self.chat.to_dict(), sort_keys=True)
        return hashlib.sha256(f"{settings}\n{self.tokenizer.fingerprint}".encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """What the token counts are called in an index."""
        return f"{self.chat.template}-{self.hash}"

    @property
    def options(self) -> str:
        """How a command line says them, as far as they differ from what is taken anyway."""
        said = [("tokenizer", str(self.tokenizer.folder))]
        said += [(name, value) for name, value in self.chat.to_dict().items() if value != ChatConfig().to_dict()[name]]
        return " ".join(f"--{name.replace('_', '-')} {_quoted(value)}" for name, value in said)

    def count(self, sample: Sample) -> tuple[int, int]:
        """(tokens, those that are trained) of a sample's words, each tag as one token."""
        encoded = self.encode(sample)
        return len(encoded.tokens), int((encoded.targets[1:] != IGNORED).sum())

    def encode(self, sample: Sample) -> Encoded:
        """A sample's words, one token for each tag."""
        where = f"sample {sample.id}"
        if sample.turns:
            return encode_chat(sample.turns, self.tokenizer, self.chat, where)
        return encode_document(sample.text, self.tokenizer, where)


class SampleFormat(Words, ABC):
    """One family's way of reading samples."""

    @abstractmethod
    def costs(self, pictures: Pictures) -> Cost:
        """What the pictures of many samples cost."""

    @abstractmethod
    def plan(self, pictures: Pictures, sample: int) -> tuple[PlannedPicture, ...]:
        """The pictures of one of the samples, in the order of their tags."""

    @abstractmethod
    def document(self, sample: Sample, pictures: Pictures, number: int, most_tokens: int) -> Document:
        """A sample at full length, cut where it has more tokens; TooLongError where it cannot be cut."""

    @abstractmethod
    def blank(self, pictures: tuple[PlannedPicture, ...], tokens: int) -> Document:
        """What stands in a row for a sample that cannot be read: its pictures' places, nothing trained."""

    @abstractmethod
    def batch(self, documents: Sequence[Document], length: int, patches: Tensor, held: tuple[int, ...]) -> TextBatch:
        """A row; `patches` are those of the held pictures, counted through all documents."""


class SplicedFormat(SampleFormat):
    """Aquila-VL's: the tokens of tiles stand in the row."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatConfig,
        grid: GridConfig,
        placeholders: tuple[int, int],
        sampling: FrameSampling | None = None,
    ) -> None:
        super().__init__(tokenizer, chat)
        self.grid, self.placeholders, self.sampling = grid, placeholders, sampling or FrameSampling()

    def costs(self, pictures: Pictures) -> Cost:
        return spliced_costs(pictures, self.grid, self.sampling)

    def plan(self, pictures: Pictures, sample: int) -> tuple[PlannedPicture, ...]:
        groups = _files_of_pictures(pictures, sample)
        media = [self._medium(pictures, files) for files in groups]
        start = int(pictures.offsets[sample])
        images = sum(medium.kind == "image" for medium in media)
        found = []
        for files, medium in zip(groups, media, strict=True):
            kind: MediaKind = "video" if medium.kind == "video" else "image" if images == 1 else "one_of_several"
            plan = plan_image(medium.width, medium.height, kind, self.grid, medium.frames)
            taken = (
                sample_frames(len(files), self.sampling.frames_per_second, self.sampling)
                if plan.kind == "video"
                else [0]
            )
            found.append(PlannedPicture(tuple(files[place] - start for place in taken), plan))
        return tuple(found)

    def _medium(self, pictures: Pictures, files: Sequence[int]) -> Medium:
        width, height = int(pictures.width[files[0]]), int(pictures.height[files[0]])
        if pictures.is_video[files[0]]:
            return Medium("video", width, height, min(len(files), self.sampling.frames_upbound))
        return Medium("image", width, height)

    def document(self, sample: Sample, pictures: Pictures, number: int, most_tokens: int) -> Document:
        media = [self._medium(pictures, files) for files in _files_of_pictures(pictures, number)]
        spliced = spliced_sample(self.encode(sample), media, self.grid, *self.placeholders, f"sample {sample.id}")
        _check_order(spliced, sample)
        cut = cut_sample(spliced, most_tokens)
        return Document(cut.tokens, cut.targets, self.plan(pictures, number))

    def blank(self, pictures: tuple[PlannedPicture, ...], tokens: int) -> Document:
        image, video = self.placeholders
        plans = [picture.plan for picture in pictures]
        runs = [np.full(plan.tokens, video if plan.kind == "video" else image) for plan in plans]
        return _blank(np.concatenate([*runs, np.zeros(0, np.int64)]), tokens, pictures)

    def batch(self, documents: Sequence[Document], length: int, patches: Tensor, held: tuple[int, ...]) -> TextBatch:
        row = pack_samples([self._as_spliced(document) for document in documents], length)
        return spliced_batch(row.tokens, row.targets, row.is_image, row.plans, patches, row.cu_seqlens, held)

    def _as_spliced(self, document: Document) -> SplicedSample:
        plans = tuple(picture.plan for picture in document.pictures)
        is_image = np.isin(document.tokens, self.placeholders)
        return SplicedSample(
            "", self.grid, document.tokens, document.targets, is_image, plans, tuple(range(len(plans)))
        )


def spliced_costs(pictures: Pictures, grid: GridConfig, sampling: FrameSampling) -> Cost:
    """What the pictures of many samples cost where their tiles' tokens stand in the row."""
    samples = len(pictures.offsets) - 1
    tags, tiles, uncut = (np.zeros(samples, np.int64) for _ in range(3))
    for kind, rows, frames in _by_kind(pictures, sampling):
        if len(rows) == 0:
            continue
        sizes = pictures.width[rows], pictures.height[rows], kind, grid, frames
        owner = _owners(pictures)[rows]
        np.add.at(tags, owner, 1)
        np.add.at(tiles, owner, tile_counts(*sizes))
        np.add.at(uncut, owner, token_counts(*sizes))
    return Cost(uncut - tags, tiles, uncut)


def _by_kind(pictures: Pictures, sampling: FrameSampling) -> list[tuple[MediaKind, Ints, Ints]]:
    """(kind, first file of each picture, frames taken of it)."""
    first = np.flatnonzero(pictures.is_first)
    files = np.diff(np.append(first, len(pictures.is_first)))
    is_video, owner = pictures.is_video[first], _owners(pictures)[first]
    images = np.bincount(owner[~is_video], minlength=len(pictures.offsets) - 1)
    alone = ~is_video & (images[owner] == 1)
    one_of_several = ~is_video & ~alone
    one = np.ones_like(first)
    return [
        ("image", first[alone], one[alone]),
        ("one_of_several", first[one_of_several], one[one_of_several]),
        ("video", first[is_video], np.minimum(files, sampling.frames_upbound)[is_video]),
    ]


class AttendedFormat(SampleFormat):
    """InfiMM's: a picture costs the text its tag alone; and that of a decoder without eyes, which has no pictures."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatConfig, image_token_id: int, grid: GridConfig) -> None:
        """`grid`: of single tiles, the tower's image."""
        super().__init__(tokenizer, chat)
        assert grid.tiling == "single", grid
        self.image_token_id, self.grid = image_token_id, grid

    def costs(self, pictures: Pictures) -> Cost:
        counts = np.diff(pictures.offsets)
        return Cost(np.zeros_like(counts), counts, np.zeros_like(counts))

    def plan(self, pictures: Pictures, sample: int) -> tuple[PlannedPicture, ...]:
        start, found = int(pictures.offsets[sample]), []
        for files in _files_of_pictures(pictures, sample):
            width, height = int(pictures.width[files[0]]), int(pictures.height[files[0]])
            found.append(PlannedPicture((files[0] - start,), plan_image(width, height, "image", self.grid)))
        return tuple(found)

    def document(self, sample: Sample, pictures: Pictures, number: int, most_tokens: int) -> Document:
        encoded, planned = self.encode(sample), self.plan(pictures, number)
        tags = int((encoded.tokens == self.image_token_id).sum())
        if tags != len(planned):
            problem = f"{len(planned)} pictures come with it"
            raise DataError(f"sample {sample.id}: tags", tags, problem, "mend or drop the sample")
        # A picture whose tag is cut off stays, seen by no token: the index alone says which pictures a row has.
        return Document(encoded.tokens[:most_tokens], encoded.targets[:most_tokens], planned)

    def blank(self, pictures: tuple[PlannedPicture, ...], tokens: int) -> Document:
        return _blank(np.full(min(len(pictures), tokens), self.image_token_id), tokens, pictures)

    def batch(self, documents: Sequence[Document], length: int, patches: Tensor, held: tuple[int, ...]) -> TextBatch:
        counts = [len(document.pictures) for document in documents]
        row = pack_samples([_without_media(document) for document in documents], length)
        batch = next_token_batch(row.tokens, row.targets, row.cu_seqlens)
        samples = [*counts, *([0] if len(row.cu_seqlens) - 1 > len(counts) else [])]
        image_of_token, has_image = preceding_images(
            row.tokens, self.image_token_id, samples, row.cu_seqlens, may_be_cut=True
        )
        media = AttendedMedia(patches, (1,) * sum(counts), held, image_of_token=image_of_token, has_image=has_image)
        return TextBatch(batch.tokens, batch.labels, batch.loss_weights, batch.cu_seqlens, media)


def _quoted(word: str) -> str:
    """A word as a shell takes it, in one line."""
    if word.isprintable():
        return shlex.quote(word)
    for written, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        word = word.replace(written, escaped)
    return f"$'{word}'"


def _without_media(document: Document) -> SplicedSample:
    nothing = np.zeros(len(document.tokens), np.bool_)
    return SplicedSample("", GridConfig(), document.tokens, document.targets, nothing, (), ())


def _owners(pictures: Pictures) -> Ints:
    """The sample of each file."""
    return np.repeat(np.arange(len(pictures.offsets) - 1), np.diff(pictures.offsets))


def _files_of_pictures(pictures: Pictures, sample: int) -> list[list[int]]:
    """The rows of each picture of a sample: one for an image, one a frame for a video."""
    start, end = int(pictures.offsets[sample]), int(pictures.offsets[sample + 1])
    groups: list[list[int]] = []
    for row in range(start, end):
        if pictures.is_first[row]:
            groups.append([])
        groups[-1].append(row)
    return groups


def _blank(places: NDArray[np.int64], tokens: int, pictures: tuple[PlannedPicture, ...]) -> Document:
    assert len(places) <= tokens, f"{tokens} tokens for the {len(places)} of the pictures"
    padded = np.concatenate([places, np.zeros(tokens - len(places), np.int64)]).astype(np.int64)
    return Document(padded, np.full(tokens, IGNORED), pictures)


def _check_order(spliced: SplicedSample, sample: Sample) -> None:
    """A sample's pictures stand in the order of their tags; plans made of the index alone rely on it."""
    if spliced.order != tuple(range(len(spliced.order))):
        problem = "images and videos in another order than their files"
        raise DataError(f"sample {sample.id}: tags", spliced.order, problem, "prepare the data again")
