"""resampler_attention, the public function: checks, the choice of path, and autograd around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megavlm_kernels.checks import require, require_device, require_kernel_dtype
from megavlm_kernels.dispatch import is_without_data, takes_triton
from megavlm_kernels.resampler.reference import resampler_attention_reference


def resampler_attention(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    cu_seqlens_media: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Latents attend to the media tokens of their own image and to that image's latents, in one softmax.

    q, k_latents, v_latents [images, latents, heads, d]; k_media, v_media [media tokens, heads, d], packed over the
    images, image i owning rows cu_seqlens_media[i] to cu_seqlens_media[i + 1]; cu_seqlens_media [images + 1], int32.
    Returns [images, latents, heads, d]. Neither the concatenation nor the scores are built on the Triton path.
    """
    _check(q, k_media, v_media, k_latents, v_latents, cu_seqlens_media)
    if takes_triton(q):
        require_kernel_dtype(q=q, k_media=k_media, v_media=v_media, k_latents=k_latents, v_latents=v_latents)
        return _ResamplerAttention.apply(q, k_media, v_media, k_latents, v_latents, cu_seqlens_media, scale)
    return resampler_attention_reference(q, k_media, v_media, k_latents, v_latents, cu_seqlens_media, scale)


class _ResamplerAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k_media: torch.Tensor,
        v_media: torch.Tensor,
        k_latents: torch.Tensor,
        v_latents: torch.Tensor,
        cu_seqlens_media: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        from megavlm_kernels.resampler import triton_kernel

        cu_seqlens_media = cu_seqlens_media.contiguous()
        inputs = triton_kernel.Inputs.of(q, k_media, v_media, k_latents, v_latents, cu_seqlens_media, scale)
        out, logsumexp = triton_kernel.forward(inputs)
        ctx.save_for_backward(q, k_media, v_media, k_latents, v_latents, cu_seqlens_media, out, logsumexp)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from megavlm_kernels.resampler import triton_kernel

        q, k_media, v_media, k_latents, v_latents, cu_seqlens_media, out, logsumexp = ctx.saved_tensors
        inputs = triton_kernel.Inputs.of(q, k_media, v_media, k_latents, v_latents, cu_seqlens_media, ctx.scale)
        return (*triton_kernel.backward(inputs, out, logsumexp, grad_out), None, None)


def _check(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    cu_seqlens_media: torch.Tensor,
) -> None:
    shape = tuple(q.shape)
    require(len(shape) == 4, "q.shape", shape, "give it as [images, latents, heads, d]")
    require(shape[1] > 0, "q.shape", shape, "there has to be a latent")
    for name, tensor in (("k_latents", k_latents), ("v_latents", v_latents)):
        require(tensor.shape == q.shape, f"{name}.shape", tuple(tensor.shape), f"it has to be that of q, {shape}")
    media = (k_media.shape[0], *shape[2:])
    for name, tensor in (("k_media", k_media), ("v_media", v_media)):
        require(tuple(tensor.shape) == media, f"{name}.shape", tuple(tensor.shape), f"it has to be {media}")
    bounds = (shape[0] + 1,)
    found = tuple(cu_seqlens_media.shape)
    require(
        found == bounds, "cu_seqlens_media.shape", found, f"it has to be {bounds}: one start per image, then the end"
    )
    require_device(
        q.device,
        k_media=k_media,
        v_media=v_media,
        k_latents=k_latents,
        v_latents=v_latents,
        cu_seqlens_media=cu_seqlens_media,
    )
    if cu_seqlens_media.is_cpu and not is_without_data(cu_seqlens_media):
        # On a GPU reading them back would make the host wait at every layer.
        bounds_found = cu_seqlens_media.tolist()
        fits = bounds_found[0] == 0 and bounds_found[-1] == media[0] and bounds_found == sorted(bounds_found)
        require(fits, "cu_seqlens_media", bounds_found, f"it has to rise from 0 to the {media[0]} media tokens")
