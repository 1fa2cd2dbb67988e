"""What the ops compute, written the slow way of the public implementations, and how far a kernel may be from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SMALL = 2e-6
"""An error that float32 arithmetic on numbers of order one may leave in a value that is zero by cancellation."""


def plain_resampler(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Image by image: build the concatenation, the scores and their softmax."""
    out = []
    for image in range(q.shape[0]):
        media = slice(int(cu_seqlens[image]), int(cu_seqlens[image + 1]))
        k = torch.cat([k_media[media], k_latents[image]])
        v = torch.cat([v_media[media], v_latents[image]])
        scores = torch.einsum("qhd,khd->hqk", q[image] * scale, k)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.stack(out) if out else q * 1


def plain_media(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, image_index: torch.Tensor, scale: float
) -> torch.Tensor:
    """Scores of every token against every latent of every image, masked; rows without an image zeroed at the end."""
    images, latents = k.shape[:2]
    if images == 0:
        return q * 0
    image_of_key = torch.arange(images, device=q.device).repeat_interleave(latents)
    is_other = image_index[:, None] != image_of_key[None, :]
    scores = torch.einsum("qhd,khd->hqk", q * scale, k.flatten(0, 1))
    weights = scores.masked_fill(is_other, torch.finfo(q.dtype).min).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v.flatten(0, 1))
    return out.masked_fill((image_index < 0)[:, None, None], 0.0)


def plain_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
    return x + flag.to(x.dtype)[:, None] * (gate.tanh().to(x.dtype) * y)


def plain_assemble(
    text: torch.Tensor,
    features: torch.Tensor,
    newline: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """One matrix product: how much each position has of each row."""
    rows = torch.cat([text, features, newline[None]])
    given = torch.ones(index.shape, device=index.device) if weight is None else weight
    given = given.to(torch.promote_types(text.dtype, torch.float32))
    share = given.new_zeros(index.shape[0], rows.shape[0])
    for column in range(index.shape[1]):
        named = (index[:, column] >= 0).nonzero()[:, 0]
        share[named, index[named, column].long()] += given[named, column]
    return (share @ rows.to(share.dtype)).to(text.dtype)


def plain_tiles(
    images: torch.Tensor,
    tiles: torch.Tensor,
    patch_size: int,
    patches_per_side: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    border: tuple[float, float, float],
) -> torch.Tensor:
    """float32, patch by patch: the image is laid on a canvas of the border that reaches beyond every tile."""
    side, rows = patch_size * patches_per_side, []
    for first, height, width, top, left in tiles.tolist():
        reach = side + max(abs(top), abs(left), height, width)
        canvas = torch.tensor(border, dtype=torch.float32).expand(2 * reach, 2 * reach, 3).clone()
        image = images[first : first + height * width * 3].cpu().view(height, width, 3)
        canvas[reach : reach + height, reach : reach + width] = image.float()
        for y in range(reach + top, reach + top + side, patch_size):
            for x in range(reach + left, reach + left + side, patch_size):
                rows.append(canvas[y : y + patch_size, x : x + patch_size].permute(2, 0, 1).flatten())
    values = torch.stack(rows).unflatten(1, (3, -1)) if rows else torch.zeros(0, 3, patch_size**2)
    per_channel = torch.tensor([mean, std])[:, :, None]
    return ((values / 255 - per_channel[0]) / per_channel[1]).flatten(1).to(images.device)


@dataclass(frozen=True)
class Case:
    """An op's differentiable inputs, in `dtype`, and its other arguments."""

    inputs: Sequence[torch.Tensor]
    others: tuple[Any, ...]
    grad_out: torch.Tensor

    def run(self, op: Callable[..., torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """[output, gradient of each input] of the op on these numbers, in another dtype if one is given."""
        inputs = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in self.inputs]
        out = op(*inputs, *self.others)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad_out.to(out.dtype))]


def assert_near_truth(case: Case, op: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor]) -> None:
    """Every value's largest error against float64 is at most twice plain PyTorch's in this dtype, and some.

    Some: one rounding of the largest value, and SMALL for each term.
    """
    for number, (found, rough, true) in enumerate(
        zip(case.run(op), case.run(plain), case.run(plain, torch.float64), strict=True)
    ):
        what = "output" if number == 0 else f"gradient of input {number - 1}"
        assert found.shape == true.shape and found.dtype == rough.dtype, what
        if not true.numel():
            continue
        # A gradient shared by many outputs, as a gate's, is a sum of that many terms, which may cancel.
        terms = max(1.0, case.grad_out.numel() / true.numel())
        error, allowed = _largest(found - true), 2 * _largest(rough - true)
        allowed += torch.finfo(found.dtype).eps * _largest(true) + SMALL * terms**0.5
        assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())
