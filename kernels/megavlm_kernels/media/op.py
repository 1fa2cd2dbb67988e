"""media_attention, the public function: checks, the choice of path, and autograd around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megavlm_kernels.checks import require, require_device, require_kernel_dtype
from megavlm_kernels.dispatch import is_without_data, takes_triton
from megavlm_kernels.media.reference import media_attention_reference
from megavlm_kernels.media.schedule import MediaSchedule, media_schedule


def media_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    image_index: torch.Tensor,
    scale: float,
    schedule: MediaSchedule | None = None,
) -> torch.Tensor:
    """Each text token attends to the latents of its own image, and to nothing else.

    q [tokens, heads, d]; k, v [images, latents, heads, d]; image_index [tokens], int32 or int64: the image of each
    token in any order, -1 = none, which gives exact zeros. Returns [tokens, heads, d].
    Several layers that share image_index share `schedule` too: media_schedule(image_index, images).
    """
    _check(q, k, v, image_index)
    if takes_triton(q):
        require_kernel_dtype(q=q, k=k, v=v)
        schedule = schedule or media_schedule(image_index, k.shape[0])
        made_for = (schedule.order.shape[0], schedule.starts.shape[0] - 1)
        fits = made_for == (q.shape[0], k.shape[0])
        require(schedule.block <= 64, "schedule.block", schedule.block, "a kernel's tile holds at most 64 tokens")
        require(fits, "schedule of (tokens, images)", made_for, f"make it for {(q.shape[0], k.shape[0])}")
        return _MediaAttention.apply(q, k, v, schedule, scale)
    return media_attention_reference(q, k, v, image_index, scale)


class _MediaAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: MediaSchedule, scale: float
    ) -> torch.Tensor:
        from megavlm_kernels.media import triton_kernel

        out, logsumexp = triton_kernel.forward(triton_kernel.Inputs.of(q, k, v, schedule, scale))
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.schedule, ctx.scale = schedule, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from megavlm_kernels.media import triton_kernel

        q, k, v, out, logsumexp = ctx.saved_tensors
        inputs = triton_kernel.Inputs.of(q, k, v, ctx.schedule, ctx.scale)
        return (*triton_kernel.backward(inputs, out, logsumexp, grad_out), None, None)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, image_index: torch.Tensor) -> None:
    shape = tuple(q.shape)
    require(len(shape) == 3, "q.shape", shape, "give it as [tokens, heads, d]")
    found = tuple(k.shape)
    fits = len(found) == 4 and found[2:] == shape[1:]
    require(fits, "k.shape", found, f"it has to be [images, latents, {', '.join(map(str, shape[1:]))}]")
    require(found[1] > 0, "k.shape", found, "there has to be a latent")
    require(v.shape == k.shape, "v.shape", tuple(v.shape), f"it has to be that of k, {found}")
    require(image_index.shape == shape[:1], "image_index.shape", tuple(image_index.shape), f"it has to be {shape[:1]}")
    require_device(q.device, k=k, v=v, image_index=image_index)
    if image_index.is_cpu and not is_without_data(image_index) and image_index.numel():
        # On a GPU reading them back would make the host wait at every layer; there a bad index counts as none.
        least, most = int(image_index.min()), int(image_index.max())
        fits = least >= -1 and most < found[0]
        require(fits, "image_index", f"{least} to {most}", f"use 0 to {found[0] - 1} for the {found[0]} images, or -1")
