"""What data hands to the model: rows of tokens, each token with its label and its weight in the loss.

A row is one sequence, or several packed one behind another; then `cu_seqlens` says where each begins, and attention
and positions stay within them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from megavlm.errors import DataError

IGNORED = -100
"""The label of a token that nothing predicts, as in transformers."""


@dataclass(frozen=True)
class Media:
    """What the tower sees of one microbatch; how the decoder sees it is the family's matter."""

    patches: Tensor
    """[tiles * patches of one, values of a patch]: the tower's patch rows, as `tiles` lays them."""
    tiles: tuple[int, ...]
    """Tiles of each picture, in the order of their tags: what the tower sees. 1 where pictures are not cut."""
    held: tuple[int, ...] | None = None
    """The pictures whose rows `patches` has, ascending; None: all. A rank needs those alone that it encodes."""

    @property
    def images(self) -> int:
        """What the tower sees: the tiles of all pictures."""
        return sum(self.tiles)

    def to(self, device: torch.device) -> Self:
        """The images on another device."""
        moved = {
            one.name: getattr(self, one.name).to(device)
            for one in fields(self)
            if isinstance(getattr(self, one.name), Tensor | AssembleTable)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class AttendedMedia(Media):
    """Images that tokens attend to, and which token sees which."""

    _: KW_ONLY
    image_of_token: Tensor
    """[rows, length], int64: the image that each token sees, counted over the microbatch; -1: none yet."""
    has_image: Tensor
    """[rows, length], bool: whether the token's sample has an image at all."""


@dataclass(frozen=True)
class AssembleTable:
    """The `index` and `weight` of `sequence_assemble`: four columns where a map is shrunk, else one and no weight.

    Positions run over the rows of the batch within each place, as megatron-core lays them: place * rows + row.
    """

    index: Tensor
    """int32 [positions, columns]"""
    weight: Tensor | None
    """float32 [positions, columns]"""

    def to(self, device: torch.device) -> AssembleTable:
        """The table on another device."""
        return AssembleTable(self.index.to(device), None if self.weight is None else self.weight.to(device))

    def slice(self, first: int, count: int) -> AssembleTable:
        """A range of positions, for a rank that holds the text of these alone, and the features and newline whole."""
        index = self.index[first : first + count]
        moved = torch.where(index < len(self.index), index - first, index - len(self.index) + count)
        weight = None if self.weight is None else self.weight[first : first + count]
        return AssembleTable(torch.where(index < 0, index, moved), weight)


@dataclass(frozen=True)
class SplicedMedia(Media):
    """Images whose tokens stand in the rows of text."""

    _: KW_ONLY
    table: AssembleTable
    """Where each position comes from."""


@dataclass(frozen=True)
class TextBatch:
    """One microbatch of text, with its images where there are any."""

    tokens: Tensor
    """[rows, length], int64."""
    labels: Tensor
    """[rows, length], int64: the token that each position is to predict; where the weight is 0, anything valid."""
    loss_weights: Tensor
    """[rows, length], float32: what each position's loss counts."""
    cu_seqlens: Tensor | None = None
    """[documents + 1], int32: where the documents of the one row begin, and its length; None: each row is one. They
    stay on the host, which has to know them."""
    media: Media | None = None
    """Images; None in a model that has no eyes."""

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.labels.shape == self.loss_weights.shape, "one label and weight a token"
        if self.cu_seqlens is not None:
            assert self.tokens.size(0) == 1, "a microbatch of packed documents is one row"
            assert int(self.cu_seqlens[-1]) == self.tokens.size(1), "the documents must fill the row"

    @property
    def target_tokens(self) -> Tensor:
        """How many positions count in the loss: an int32 scalar, the form megatron-core asks for."""
        return self.loss_weights.count_nonzero().to(torch.int32)

    def to(self, device: torch.device) -> TextBatch:
        """The batch on another device."""
        media = None if self.media is None else self.media.to(device)
        tokens, labels, weights = (tensor.to(device) for tensor in (self.tokens, self.labels, self.loss_weights))
        return TextBatch(tokens, labels, weights, self.cu_seqlens, media)


def next_token_batch(tokens: Tensor, targets: Tensor | None = None, cu_seqlens: Tensor | None = None) -> TextBatch:
    """Each position predicts the one behind it; `targets` are labels in transformers' sense (IGNORED: not trained).

    The last position of a row, and of each packed document, predicts nothing.
    """
    targets = tokens if targets is None else targets
    shifted = torch.roll(targets, -1, dims=1)
    ends = torch.tensor([tokens.size(1)]) if cu_seqlens is None else cu_seqlens[1:].long()
    shifted[:, ends - 1] = IGNORED
    counts = shifted != IGNORED
    return TextBatch(tokens, shifted.masked_fill(~counts, 0), counts.float(), cu_seqlens)


def preceding_images(
    tokens: Tensor,
    image_token_id: int,
    images_of_samples: Sequence[int],
    cu_seqlens: Tensor | None = None,
    *,
    may_be_cut: bool = False,
) -> tuple[Tensor, Tensor]:
    """(image_of_token, has_image) of `Media`: each token sees the last image tagged at or before it in its sample.

    `images_of_samples` says how many images come with each sample (a row, or a document of a packed row); a sample
    whose tags say otherwise is refused. Where samples may be cut, the tags of the last images may be gone, and nothing
    sees these.
    """
    rows, length = tokens.shape
    starts = [row * length for row in range(rows)] if cu_seqlens is None else cu_seqlens[:-1].tolist()
    bounds = [*starts, rows * length]
    is_tag = (tokens == image_token_id).flatten()
    image_of_token = torch.full((rows * length,), -1, dtype=torch.int64)
    has_image = torch.zeros(rows * length, dtype=torch.bool)
    before = 0
    for sample, images in enumerate(images_of_samples):
        span = slice(bounds[sample], bounds[sample + 1])
        seen = is_tag[span].cumsum(0)
        tags = int(seen[-1]) if seen.numel() else 0
        if tags > images or (tags < images and not may_be_cut):
            raise DataError(
                f"sample {sample}: tags of images", tags, f"{images} images come with it", "use one tag for each image"
            )
        image_of_token[span] = torch.where(seen > 0, seen - 1 + before, -1)
        has_image[span] = images > 0
        before += images
    return image_of_token.view(rows, length), has_image.view(rows, length)
