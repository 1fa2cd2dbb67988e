"""What the first stage makes of a microbatch's images, and what the other stages are told of them.

The tensor-parallel ranks of the first stage share the images out; each encodes its own, and what is made of them is
gathered. A frozen tower's features need no gradient, so they can also be computed ahead of the step's schedule, by all
tensor- and pipeline-parallel ranks together.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megavlm import ranges
from megavlm.batch import AttendedMedia, Media, SplicedMedia, TextBatch
from megavlm.model.aquila_vl.model import SplicedInput
from megavlm.model.infimm.model import MediaInput
from megavlm.parallel.groups import Groups
from megavlm.parallel.vision_parallel import (
    Deal,
    Gradient,
    deal_images,
    encode_ahead,
    gather_images,
    in_tiles,
    rows_of_images,
)

Features = Callable[[], Tensor]
"""The tower's features of this rank's own images, computed when they are asked for."""


class MediaInputs(ABC):
    """Makes the chunks' argument `media` of a step's batches; `tower` is there on the ranks that encode."""

    def __init__(self, tower: nn.Module | None, patches_per_image: int, groups: Groups, over_all_stages: bool) -> None:
        self.tower = tower
        self.patches_per_image = patches_per_image
        self.groups = groups
        self.tensor_group = groups.collection.tp
        self.over_all_stages = over_all_stages

    def __call__(self, batches: Sequence[TextBatch]) -> Callable[[TextBatch], dict[str, Any]]:
        """Called once a step, by all ranks; the result once a microbatch and chunk."""
        ahead: dict[int, Tensor] = {}
        if self.over_all_stages:
            unique = list({id(batch): batch for batch in batches}.values())
            ahead = dict(zip(map(id, unique), self._encode_ahead(unique), strict=False))
        return lambda batch: {"media": self._input(_media(batch), ahead.get(id(batch)))}

    @abstractmethod
    def of_first_stage(self, media: Media, deal: Deal, features: Features) -> object:
        """The argument of the first stage's chunks."""

    @abstractmethod
    def of_other_stages(self, media: Media) -> object:
        """The argument of all other chunks."""

    def own_pictures(self, tiles: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Which pictures of each microbatch this rank encodes: those that have to be read and decoded here.

        `tiles` are those of each picture of each microbatch of a step.
        """
        if not self.over_all_stages:
            return [tuple(self._pictures_dealt(of_batch)) for of_batch in tiles]
        group = self.groups.collection.mp
        own = deal_images([tile for of_batch in tiles for tile in of_batch], group.size())[group.rank()]
        ends = list(itertools.accumulate(map(len, tiles), initial=0))
        return [tuple(n - first for n in own if first <= n < end) for first, end in itertools.pairwise(ends)]

    def _pictures_dealt(self, tiles: Sequence[int]) -> list[int]:
        """Of one microbatch, over the first stage's tensor-parallel ranks."""
        if self.groups.pipeline_rank > 0:
            return []
        return deal_images(tiles, self.tensor_group.size())[self.tensor_group.rank()]

    def _input(self, media: Media, ahead: Tensor | None) -> object:
        if self.groups.pipeline_rank > 0:
            return self.of_other_stages(media)
        deal = in_tiles(deal_images(media.tiles, self.tensor_group.size()), media.tiles)
        own = deal[self.tensor_group.rank()]
        encode = partial(self._encode, media) if ahead is None else partial(rows_of_images, ahead, 1, own)
        return self.of_first_stage(media, deal, encode)

    @ranges.named("tower")
    def _encode(self, media: Media) -> Tensor:
        assert self.tower is not None
        rows = self._rows([media], [tuple(self._pictures_dealt(media.tiles))])
        learns = any(parameter.requires_grad for parameter in self.tower.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            features: Tensor = self.tower(rows)
        return features

    @ranges.named("tower")
    def _encode_ahead(self, batches: Sequence[TextBatch]) -> list[Tensor]:
        """Features of each batch's images, on the first stage; the other stages only help."""
        assert self.tower is not None
        group = self.groups.collection.mp
        media = [_media(batch) for batch in batches]
        tiles = [tile for one in media for tile in one.tiles]
        deal = in_tiles(deal_images(tiles, group.size()), tiles)
        rows = self._rows(media, self.own_pictures([one.tiles for one in media]))
        keep = self.groups.pipeline_rank == 0
        images_in = [one.images for one in media]
        return encode_ahead(self.tower, rows, self.patches_per_image, deal, group, images_in, keep)

    def _rows(self, media: Sequence[Media], own: Sequence[tuple[int, ...]]) -> Tensor:
        """The patch rows of the own pictures of several microbatches."""
        assert self.tower is not None
        rows = torch.cat([self._rows_of(one, pictures) for one, pictures in zip(media, own, strict=True)])
        return rows.to(next(self.tower.parameters()).dtype)

    def _rows_of(self, media: Media, own: tuple[int, ...]) -> Tensor:
        if media.held is not None:
            assert media.held == own, f"the batch holds the pictures {media.held}, this rank encodes {own}"
            return media.patches
        (tiles,) = in_tiles([list(own)], media.tiles)
        return rows_of_images(media.patches, self.patches_per_image, tiles)


class AttendedInputs(MediaInputs):
    """InfiMM's: each rank resamples its share of the images, and the latents are gathered."""

    def of_first_stage(self, media: Media, deal: Deal, features: Features) -> MediaInput:
        gather = partial(gather_images, deal=deal, group=self.tensor_group, gradient="replicated")
        return MediaInput(_token_map(media), media.images, features, gather)

    def of_other_stages(self, media: Media) -> MediaInput:
        return MediaInput(_token_map(media), media.images)


class SplicedInputs(MediaInputs):
    """Aquila-VL's: each rank projects its share of the tiles; the tokens are gathered and put into the text.

    Where the sequence is sliced over the ranks, each assembles its own slice out of all tiles' tokens.
    """

    def __init__(self, *arguments: Any, sequence_parallel: bool) -> None:
        super().__init__(*arguments)
        self.slices = self.tensor_group.size() if sequence_parallel else 1

    def of_first_stage(self, media: Media, deal: Deal, features: Features) -> SplicedInput:
        assert isinstance(media, SplicedMedia)
        gradient: Gradient = "partial" if self.slices > 1 else "replicated"
        gather = partial(gather_images, deal=deal, group=self.tensor_group, gradient=gradient)
        count = len(media.table.index) // self.slices
        table = media.table.slice(self.tensor_group.rank() * count, count) if self.slices > 1 else media.table
        return SplicedInput(features, gather, table)

    def of_other_stages(self, media: Media) -> None:
        return None


def _token_map(media: Media) -> Tensor:
    """[2, s, b]: each token's image, and whether its sample has one."""
    assert isinstance(media, AttendedMedia)
    return torch.stack([media.image_of_token, media.has_image.long()]).transpose(1, 2)


def _media(batch: TextBatch) -> Media:
    assert batch.media is not None, "a model with eyes needs to be told that there is nothing to see"
    return batch.media
