"""Vision towers, data-parallel over model-parallel ranks: who encodes which image, and how features and gradients meet.

Every rank of a group holds the whole tower and encodes the images that `deal_images` gives it; the features are
gathered in the images' order. All ranks derive the deal from the same metadata, so all know how many images each other
one has, and a rank without any takes part in every collective with zero rows.

Gradients come back in two steps. The gathered features' gradient goes to the rank that encoded the image, by one of
two rules (`Gradient`); the tower's parameters, each rank's gradient of which then covers its own images only, are
summed over the ranks when a step's gradients are finalised.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

Deal = list[list[int]]
"""For each rank of a group the images it encodes, ascending."""

Gradient = Literal["replicated", "partial"]
"""What a rank's gradient of the gathered features is. `replicated`: the full one already, the same on every rank (what
used the features was computed alike everywhere, or summed its input gradient over the ranks itself, as a
column-parallel layer does). `partial`: this rank's share, to be summed over the ranks (it used a slice of the features,
or a column-parallel layer that leaves the sum to others)."""

_NUMBERS_PER_MESSAGE = 64 * 2**20
"""Bounds the copies made for coalescing: 256 MB in float32."""


def deal_images(costs: Sequence[float], ranks: int) -> Deal:
    """Which rank encodes which image: the costliest first, each to the rank with the least to do so far.

    A function of its arguments alone. No rank gets more than the mean and one image on top.
    """
    deal: Deal = [[] for _ in range(ranks)]
    # Among equal loads the rank with fewer images, so that images without cost are spread as well.
    least_first = [(0.0, 0, rank) for rank in range(ranks)]
    for image in sorted(range(len(costs)), key=lambda image: (-costs[image], image)):
        load, count, rank = heapq.heappop(least_first)
        deal[rank].append(image)
        heapq.heappush(least_first, (load + costs[image], count + 1, rank))
    return [sorted(images) for images in deal]


def in_tiles(deal: Deal, tiles: Sequence[int]) -> Deal:
    """A deal of pictures, each of so many tiles, as one of tiles: what the tower sees of a picture stays together."""
    ends = list(itertools.accumulate(tiles))
    return [[tile for picture in own for tile in range(ends[picture] - tiles[picture], ends[picture])] for own in deal]


def rows_of_images(patches: Tensor, patches_per_image: int, images: Sequence[int]) -> Tensor:
    """The patch rows of some of the images whose rows are all here."""
    chosen = torch.tensor(images, dtype=torch.long, device=patches.device)
    return patches.unflatten(0, (-1, patches_per_image)).index_select(0, chosen).flatten(0, 1)


def gather_images(mine: Tensor, deal: Deal, group: dist.ProcessGroup, gradient: Gradient) -> Tensor:
    """All images in their order on every rank, [all images, ...], from each rank's own, [own images, ...].

    With `partial` the backward is a collective, which sums in the features' dtype: the result must be part of the loss
    on every rank, if only times zero.
    """
    assert mine.size(0) == len(deal[group.rank()]), f"{mine.size(0)} images, dealt {len(deal[group.rank()])}"
    gathered: Tensor = _GatherImages.apply(mine, deal, group, gradient)
    return gathered


class _GatherImages(torch.autograd.Function):
    """Padded to the largest number of images of a rank: gloo and NCCL both gather equal sizes only."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, deal: Deal, group: dist.ProcessGroup, gradient: Gradient) -> Tensor:
        ctx.deal, ctx.group, ctx.gradient = deal, group, gradient
        slots = _slots(deal, mine.device)
        if len(slots) == 0:  # known to all ranks, so none waits for a message
            return mine.new_zeros(mine.shape)
        padded = mine.new_zeros(_most_images(deal), *mine.shape[1:])
        padded[: mine.size(0)] = mine
        gathered = mine.new_empty(len(deal) * padded.size(0), *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return gathered.index_select(0, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = ctx.deal[ctx.group.rank()]
        if ctx.gradient == "replicated" or grad.size(0) == 0:
            return grad.index_select(0, torch.tensor(own, dtype=torch.long, device=grad.device)), None, None, None
        most = _most_images(ctx.deal)
        parts = grad.new_zeros(len(ctx.deal) * most, *grad.shape[1:])
        parts[_slots(ctx.deal, grad.device)] = grad
        summed = grad.new_empty(most, *grad.shape[1:])
        dist.reduce_scatter_tensor(summed, parts, group=ctx.group)
        return summed[: len(own)], None, None, None


def _most_images(deal: Deal) -> int:
    return max(len(images) for images in deal)


def _slots(deal: Deal, device: torch.device) -> Tensor:
    """For each image, in their order, its row among those of all ranks, each padded to the same number."""
    most = _most_images(deal)
    rows = {image: rank * most + place for rank, images in enumerate(deal) for place, image in enumerate(images)}
    assert sorted(rows) == list(range(len(rows))), f"each image must be dealt once: {deal}"
    return torch.tensor([rows[image] for image in range(len(rows))], dtype=torch.long, device=device)


def encode_dealt(
    tower_and_connector: Callable[[Tensor], Tensor],
    patches: Tensor,
    patches_per_image: int,
    deal: Deal,
    group: dist.ProcessGroup,
    gradient: Gradient,
) -> Tensor:
    """Features of all images in their order, [all images, ...], from the patch rows of this rank's own images.

    The tower runs on every rank, on zero rows where there is no image: its parameters then get a gradient of zeros,
    which overlapped reductions wait for.
    """
    assert patches.size(0) == len(deal[group.rank()]) * patches_per_image, (
        f"{patches.size(0)} patch rows, own images {deal[group.rank()]} x {patches_per_image}"
    )
    return gather_images(tower_and_connector(patches), deal, group, gradient)


@torch.no_grad()
def encode_ahead(
    tower: Callable[[Tensor], Tensor],
    patches: Tensor,
    patches_per_image: int,
    deal: Deal,
    group: dist.ProcessGroup,
    images_in: Sequence[int],
    keep: bool,
    images_at_once: int = 32,
) -> list[Tensor]:
    """A frozen tower's features of a whole step, one tensor a microbatch; an empty list where they are not kept.

    The step's images, numbered through all its microbatches (`images_in` says how many each has), are dealt over all
    tensor- and pipeline-parallel ranks; nothing flows back, so the later stages can help, too. `patches` are the rows
    of this rank's own images, `keep` is for the ranks of the first stage. They hold the features of the whole step,
    the others of their own images and, in passing, of one microbatch. `images_at_once` bounds the tower's activations.
    """
    own = deal[group.rank()]
    assert patches.size(0) == len(own) * patches_per_image, f"{patches.size(0)} patch rows, own images {own}"
    assert sum(map(len, deal)) == sum(images_in), f"{sum(map(len, deal))} images dealt, {sum(images_in)} in the step"
    mine = torch.cat([tower(some) for some in patches.split(images_at_once * patches_per_image)])
    kept = []
    for part in _deal_of_each_microbatch(deal, images_in):
        count = len(part[group.rank()])
        features = gather_images(mine[:count], part, group, "replicated")
        mine = mine[count:]
        if keep:
            kept.append(features)
    return kept


def _deal_of_each_microbatch(deal: Deal, images_in: Sequence[int]) -> Iterator[Deal]:
    """The deal of a step cut into those of its microbatches, each numbering its images from 0."""
    first = 0
    for count in images_in:
        yield [[image - first for image in images if first <= image < first + count] for images in deal]
        first += count


def sum_over_ranks(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum `main_grad` of the trainable marked parameters over the ranks of the group, in few messages.

    To be called when gradients have been reduced over the data-parallel ranks. Under the distributed optimizer only a
    shard of them is valid on each of those. It is the same shard on all ranks of a tensor-parallel group, whose
    parameters have the same shapes, so the sum of that shard is right; the rest is summed along and read by nobody.
    """
    if group.size() == 1:
        return
    for gradients in _messages([_main_grad(parameter) for parameter in parameters if _is_summed(parameter)]):
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat, group=group)
        for gradient, total in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(total)


def _is_summed(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and getattr(parameter, "vision_parallel", False)


def _main_grad(parameter: nn.Parameter) -> Tensor:
    # megatron-core reduces gradients under these marks over the same ranks: once more would count them twice.
    for mark in ("sequence_parallel", "average_gradients_across_tp_domain"):
        assert not getattr(parameter, mark, False), f"marked both vision_parallel and {mark}"
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def _messages(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype together, in order, as many as a message may hold."""
    message: list[Tensor] = []
    for gradient in gradients:
        full = sum(held.numel() for held in message) + gradient.numel() > _NUMBERS_PER_MESSAGE
        if message and (full or message[0].dtype != gradient.dtype):
            yield message
            message = []
        message.append(gradient)
    if message:
        yield message


def finalize_with_vision(group: dist.ProcessGroup) -> Callable[..., None]:
    """megatron-core's `finalize_model_grads`, and behind it the sum over the group of what is marked."""

    def finalize(
        model: list[nn.Module],
        num_tokens: Tensor | None = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> None:
        finalize_model_grads(model, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
        sum_over_ranks((parameter for chunk in model for parameter in chunk.parameters()), group)

    return finalize
