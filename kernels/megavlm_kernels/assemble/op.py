"""sequence_assemble, the public function: checks, the choice of path, and autograd around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megavlm_kernels.assemble.reference import sequence_assemble_reference
from megavlm_kernels.assemble.schedule import AssembleSchedule, assemble_schedule
from megavlm_kernels.checks import require, require_device, require_kernel_dtype
from megavlm_kernels.dispatch import is_without_data, takes_triton


def sequence_assemble(
    text: torch.Tensor,
    features: torch.Tensor,
    newline: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor | None = None,
    schedule: AssembleSchedule | None = None,
) -> torch.Tensor:
    """Packed rows from token embeddings and image features: out[p] = sum over c of weight[p, c] * row index[p, c].

    text [text rows, width]; features [patch rows, width]; newline [width]. index [positions, columns], int32 or int64,
    counts through the rows of text, then those of features, then the newline; -1 = none, so a position of -1 alone is
    zeros. weight float32 [positions, columns], None = all 1 (no gradient). One column copies; four mix the neighbours
    of a place in a map that is shrunk bilinearly. Returns [positions, width].

    A range of positions, as a sequence-parallel rank has, is those rows of index and weight; the gradients of features
    and newline are then that range's share. Rows that no position names get zero gradients, so text may hold an
    embedding for every position, whether or not an image takes its place.

    schedule: assemble_schedule(index, text rows + patch rows + 1), for the backward; made there where it is not given.
    """
    _check(text, features, newline, index, weight)
    if takes_triton(text):
        require_kernel_dtype(text=text, features=features, newline=newline)
        sources = text.shape[0] + features.shape[0] + 1
        if schedule is not None:
            made_for = (schedule.order.shape[0], schedule.starts.shape[0] - 1)
            expected = (index.numel(), sources)
            require(made_for == expected, "schedule of (places, rows)", made_for, f"make it for {expected}")
            require_device(text.device, schedule=schedule.order)
        return _SequenceAssemble.apply(text, features, newline, index, weight, schedule)
    return sequence_assemble_reference(text, features, newline, index, weight)


class _SequenceAssemble(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        text: torch.Tensor,
        features: torch.Tensor,
        newline: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor | None,
        schedule: AssembleSchedule | None,
    ) -> torch.Tensor:
        from megavlm_kernels.assemble import triton_kernel

        index, weight = index.contiguous(), None if weight is None else weight.contiguous()
        ctx.save_for_backward(index, weight)
        ctx.schedule, ctx.rows = schedule, (text.shape[0], features.shape[0])
        return triton_kernel.forward(text.contiguous(), features.contiguous(), newline.contiguous(), index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from megavlm_kernels.assemble import triton_kernel

        index, weight = ctx.saved_tensors
        schedule = ctx.schedule or assemble_schedule(index, sum(ctx.rows) + 1)
        uses = triton_kernel.Uses(schedule, weight, index.shape[1])
        return (*triton_kernel.backward(uses, grad_out.contiguous(), *ctx.rows), None, None, None)


def _check(
    text: torch.Tensor,
    features: torch.Tensor,
    newline: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor | None,
) -> None:
    shape, found = tuple(text.shape), tuple(features.shape)
    require(len(shape) == 2, "text.shape", shape, "give it as [text rows, width]")
    require(len(found) == 2 and found[1] == shape[1], "features.shape", found, f"it has to be [patch rows, {shape[1]}]")
    require(newline.shape == shape[1:], "newline.shape", tuple(newline.shape), f"it has to be {shape[1:]}")
    places = tuple(index.shape)
    require(len(places) == 2 and places[1] > 0, "index.shape", places, "give it as [positions, columns]")
    require(index.dtype in (torch.int32, torch.int64), "index.dtype", index.dtype, "use int32 or int64")
    require_device(text.device, features=features, newline=newline, index=index)
    if weight is not None:
        require(
            weight.shape == index.shape, "weight.shape", tuple(weight.shape), f"it has to be that of index, {places}"
        )
        require(weight.dtype == torch.float32, "weight.dtype", weight.dtype, "use float32")
        require_device(text.device, weight=weight)
    if index.is_cpu and not is_without_data(index) and index.numel():
        # On a GPU reading them back would make the host wait at every step; there a bad index counts as none.
        least, most, rows = int(index.min()), int(index.max()), shape[0] + found[0] + 1
        remedy = (
            f"use 0 to {rows - 1} for the {shape[0]} rows of text, the {found[0]} of features and the newline, or -1"
        )
        require(least >= -1 and most < rows, "index", f"{least} to {most}", remedy)
