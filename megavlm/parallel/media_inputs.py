"""What the first stage makes of a microbatch's images, and what the other stages are told of them.

The tower is frozen, so its features need no gradient and are computed ahead of the chunk's forward pass: by the
tensor-parallel ranks of the first stage, microbatch by microbatch, or by all tensor- and pipeline-parallel ranks
together before the step's schedule begins. Each tensor-parallel rank of the first stage then resamples its share of
the images, and the latents are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.batch import Media, TextBatch
from megavlm.model.infimm.model import MediaInput
from megavlm.parallel.groups import Groups
from megavlm.parallel.vision_parallel import Deal, deal_images, encode_ahead, gather_images, rows_of_images


class MediaInputs:
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

    def _input(self, media: Media, features: Tensor | None) -> MediaInput:
        token_map = torch.stack([media.image_of_token, media.has_image.long()]).transpose(1, 2)
        if self.groups.pipeline_rank > 0:
            return MediaInput(token_map, media.images)
        deal = deal_images([1.0] * media.images, self.tensor_group.size())
        own = deal[self.tensor_group.rank()]
        encode = partial(self._encode, media, own) if features is None else partial(rows_of_images, features, 1, own)
        gather = partial(gather_images, deal=deal, group=self.tensor_group, gradient="replicated")
        return MediaInput(token_map, media.images, encode, gather)

    @torch.no_grad()
    def _encode(self, media: Media, own: list[int]) -> Tensor:
        assert self.tower is not None
        features: Tensor = self.tower(self._rows(media.patches, own))
        return features

    def _encode_ahead(self, batches: Sequence[TextBatch]) -> list[Tensor]:
        """Features of each batch's images, on the first stage; the other stages only help."""
        assert self.tower is not None
        group = self.groups.collection.mp
        images_in = [_media(batch).images for batch in batches]
        deal: Deal = deal_images([1.0] * sum(images_in), group.size())
        patches = torch.cat([_media(batch).patches for batch in batches])
        rows = self._rows(patches, deal[group.rank()])
        keep = self.groups.pipeline_rank == 0
        return encode_ahead(self.tower, rows, self.patches_per_image, deal, group, images_in, keep)

    def _rows(self, patches: Tensor, images: list[int]) -> Tensor:
        assert self.tower is not None
        rows = rows_of_images(patches, self.patches_per_image, images)
        return rows.to(next(self.tower.parameters()).dtype)


def _media(batch: TextBatch) -> Media:
    assert batch.media is not None, "a model with eyes needs to be told that there is nothing to see"
    return batch.media
