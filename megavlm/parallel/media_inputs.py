"""What the first stage makes of a microbatch's images, and what the other stages are told of them.

The tower is frozen: its features need no gradient, so they are computed ahead of the chunk's forward pass. Each
tensor-parallel rank of the first stage encodes its share of the images and resamples them; the latents are gathered.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from megavlm.batch import Media, TextBatch
from megavlm.model.infimm.model import MediaInput
from megavlm.parallel.groups import Groups
from megavlm.parallel.vision_parallel import deal_images, gather_images, rows_of_images


class MediaInputs:
    """Makes the chunk's argument `media` of a batch; `tower` is there on the first stage only."""

    def __init__(self, tower: nn.Module | None, patches_per_image: int, groups: Groups) -> None:
        self.tower = tower
        self.patches_per_image = patches_per_image
        self.tensor_group = groups.collection.tp

    def __call__(self, batch: TextBatch) -> dict[str, Any]:
        media = batch.media
        assert media is not None, "a model with eyes needs to be told that there is nothing to see"
        token_map = torch.stack([media.image_of_token, media.has_image.long()]).transpose(1, 2)
        if self.tower is None:
            return {"media": MediaInput(token_map, media.images)}
        deal = deal_images([1.0] * media.images, self.tensor_group.size())
        gather = partial(gather_images, deal=deal, group=self.tensor_group, gradient="replicated")
        return {
            "media": MediaInput(token_map, media.images, self._encode(media, deal[self.tensor_group.rank()]), gather)
        }

    @torch.no_grad()
    def _encode(self, media: Media, own: list[int]) -> torch.Tensor:
        assert self.tower is not None
        rows = rows_of_images(media.patches, self.patches_per_image, own)
        features: torch.Tensor = self.tower(rows.to(next(self.tower.parameters()).dtype))
        return features
