"""Where each position of a packed row comes from: the table that `sequence_assemble` gathers by.

Text: the embeddings of all positions, row p for position p, those of image tokens left unread. So the embedding takes
the token ids as they are, with the same shape in every step. Features: the patch rows of the batch, as `megavlm.tiles`
orders them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megavlm.batch import AssembleTable, SplicedMedia, TextBatch, next_token_batch
from megavlm.tiles import ImagePlan, Ints

Floats = NDArray[np.float32]
NEIGHBOURS = 4
NONE = -1


def spliced_batch(
    tokens: Tensor,
    targets: Tensor,
    is_image: NDArray[np.bool_],
    plans: Sequence[ImagePlan],
    patches: Tensor,
    cu_seqlens: Tensor | None = None,
    held: tuple[int, ...] | None = None,
) -> TextBatch:
    """A microbatch of rows [rows, length] whose positions of `is_image` hold the tokens of the planned images.

    `patches` are the patch rows of all of them, or of those that are `held`; `targets` are labels in transformers'
    sense.
    """
    tiles = tuple(plan.tiles for plan in plans)
    media = SplicedMedia(patches, tiles, held, table=assemble_table(is_image, plans))
    return replace(next_token_batch(tokens, targets, cu_seqlens), media=media)


def assemble_table(is_image: NDArray[np.bool_], plans: Sequence[ImagePlan]) -> AssembleTable:
    """For a row, or rows [rows, length]; positions of `is_image` hold the tokens of the batch's images, in order."""
    if is_image.ndim == 2:
        return _by_place(assemble_table(is_image.reshape(-1), plans), *is_image.shape)
    positions, tokens = len(is_image), sum(plan.tokens for plan in plans)
    found = int(is_image.sum())
    assert found == tokens, f"{found} positions for the {tokens} tokens of the images"
    newline = positions + sum(plan.patch_rows for plan in plans)
    columns = NEIGHBOURS if any(mixes(plan) for plan in plans) else 1
    index, weight = np.full((positions, columns), NONE, np.int32), np.zeros((positions, columns), np.float32)
    index[~is_image, 0], weight[~is_image, 0] = np.flatnonzero(~is_image), 1
    places, first_token, first_row = np.flatnonzero(is_image), 0, positions
    for plan in plans:
        rows, shares = image_sources(plan)
        # The newline stands behind the patch rows of a plan, and behind those of all in the table.
        sources = np.where(rows == plan.patch_rows, newline, np.where(rows == NONE, NONE, rows + first_row))
        at = places[first_token : first_token + plan.tokens]
        index[at], weight[at] = sources[:, :columns], shares[:, :columns]
        first_token, first_row = first_token + plan.tokens, first_row + plan.patch_rows
    return AssembleTable(torch.from_numpy(index), torch.from_numpy(weight) if columns > 1 else None)


def _by_place(table: AssembleTable, rows: int, length: int) -> AssembleTable:
    """The table of rows that stand one behind another, in the order that `AssembleTable` asks for."""
    order = torch.arange(rows * length).view(rows, length).T.flatten()
    index = table.index[order]
    is_text = (index >= 0) & (index < len(order))
    moved = torch.argsort(order).to(index.dtype)[index.clamp(0, len(order) - 1).long()]
    return AssembleTable(torch.where(is_text, moved, index), None if table.weight is None else table.weight[order])


def mixes(plan: ImagePlan) -> bool:
    """Whether a token of this image is made of several patch rows."""
    return plan.is_shrunk or plan.kind == "video"


def image_sources(plan: ImagePlan) -> tuple[Ints, Floats]:
    """(rows, weights), each [plan.tokens, 4]: the image's patch rows that make each token; row patch_rows = newline."""
    grid, newline = plan.grid, np.array([plan.patch_rows])
    if plan.kind == "video":
        frame = np.arange(grid.tokens_per_tile).reshape(grid.tokens_per_side, grid.tokens_per_side)
        side = (grid.tokens_per_side + 1) // 2
        rows, weights = shrunk(frame, side, side)
        first_rows = np.arange(plan.tiles)[:, None, None] * grid.tokens_per_tile
        frames = (rows + first_rows).reshape(-1, NEIGHBOURS), np.tile(weights, (plan.tiles, 1))
        return _joined(frames, _copied(newline.repeat(grid.newlines)))
    base = _copied(np.arange(grid.tokens_per_tile))
    if plan.split is None:
        return _joined(base, _copied(newline.repeat(grid.newlines)))
    split = plan.split
    if plan.is_shrunk:
        rows, weights = shrunk(plan.map_patch_rows(), split.token_rows, split.token_columns)
    else:
        rows, weights = _copied(plan.map_patch_rows().reshape(-1))
    shape = (split.token_rows, split.token_columns, NEIGHBOURS)
    end_rows, end_weights = _copied(newline.repeat(split.token_rows))
    closed_rows = np.concatenate([rows.reshape(shape), end_rows[:, None]], 1).reshape(-1, NEIGHBOURS)
    closed_weights = np.concatenate([weights.reshape(shape), end_weights[:, None]], 1).reshape(-1, NEIGHBOURS)
    return _joined(base, (closed_rows, closed_weights))


def shrunk(rows: Ints, height: int, width: int) -> tuple[Ints, Floats]:
    """(rows, weights), each [height * width, 4], of a map of patch rows that is shrunk bilinearly.

    As torch.nn.functional.interpolate does it with align_corners off and no antialias: each place of the small map
    mixes the four around its middle in the large one.
    """
    top, bottom, low = _neighbours(rows.shape[0], height)
    left, right, near = _neighbours(rows.shape[1], width)
    one = np.float32(1)
    corners = ((top, left, one - low, one - near), (top, right, one - low, near), (bottom, left, low, one - near),
               (bottom, right, low, near))  # fmt: skip
    mixed = np.stack([rows[np.ix_(y, x)] for y, x, _, _ in corners], -1)
    weights = np.stack([np.outer(of_y, of_x) for _, _, of_y, of_x in corners], -1)
    return mixed.reshape(-1, NEIGHBOURS), weights.reshape(-1, NEIGHBOURS)


def _neighbours(length: int, shrunk_length: int) -> tuple[Ints, Ints, Floats]:
    """(before, behind, weight of the one behind) of each place along a side, rounded where PyTorch rounds."""
    scale = np.float32(length) / np.float32(shrunk_length)
    # Its compilers make the product and the subtraction one operation, rounded once.
    place = ((np.arange(shrunk_length) + 0.5) * np.float64(scale) - 0.5).clip(min=0).astype(np.float32)
    before = place.astype(np.int64)
    return before, np.minimum(before + 1, length - 1), place - before.astype(np.float32)


def _copied(rows: Ints) -> tuple[Ints, Floats]:
    """Tokens made of one row each."""
    sources, weights = np.full((len(rows), NEIGHBOURS), NONE), np.zeros((len(rows), NEIGHBOURS), np.float32)
    sources[:, 0], weights[:, 0] = rows, 1
    return sources, weights


def _joined(*parts: tuple[Ints, Floats]) -> tuple[Ints, Floats]:
    rows, weights = zip(*parts, strict=True)
    return np.concatenate(rows), np.concatenate(weights)
