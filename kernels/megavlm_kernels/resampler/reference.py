"""resampler_attention in plain PyTorch: the truth that the kernel is held against, and what the CPU runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megavlm_kernels.dispatch import is_without_data


def resampler_attention_reference(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    cu_seqlens_media: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Shapes as in `op.resampler_attention`; autograd gives the backward."""
    lengths = _lengths(cu_seqlens_media, k_media.shape[0])
    if len(set(lengths)) <= 1:
        per_image = (len(lengths), lengths[0] if lengths else 0, *k_media.shape[1:])
        return _attend(
            q,
            torch.cat([k_media.reshape(per_image), k_latents], dim=1),
            torch.cat([v_media.reshape(per_image), v_latents], dim=1),
            scale,
        )
    sources = zip(q, k_media.split(lengths), v_media.split(lengths), k_latents, v_latents, strict=True)
    return torch.cat(
        [
            _attend(q_one[None], torch.cat([k, k_own])[None], torch.cat([v, v_own])[None], scale)
            for q_one, k, v, k_own, v_own in sources
        ]
    )


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """All [images, tokens, heads, d]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def _lengths(cu_seqlens_media: torch.Tensor, tokens: int) -> list[int]:
    """Media tokens of each image; where there is no data to read (a planning trace), as even as can be."""
    images = cu_seqlens_media.shape[0] - 1
    if is_without_data(cu_seqlens_media):
        return [tokens // images + (image < tokens % images) for image in range(images)]
    return cu_seqlens_media.diff().tolist()
