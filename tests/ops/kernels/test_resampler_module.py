"""The perceiver resampler over the kernels: its strided views, and no image at all, as over plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megavlm_kernels
from megavlm.model.resampler import Resampler, ResamplerConfig

CONFIG = ResamplerConfig(width=24, depth=1, num_latents=5, heads=2, head_width=16)


def results(path: str, images: int, device: torch.device) -> list[Tensor]:
    """The latents, and the gradients of the features and of each parameter."""
    torch.manual_seed(1)
    resampler = Resampler(CONFIG).to(device)
    features = torch.randn(images, 19, CONFIG.width).to(device).requires_grad_()
    with megavlm_kernels.use(path):
        latents = resampler(features)
        (latents * torch.randn(latents.shape).to(device)).sum().backward()
    gradients = [tensor.grad for tensor in (features, *resampler.parameters())]
    return [latents.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("images", [0, 1, 3])
def test_the_resampler_is_the_same_over_both_paths(device: torch.device, images: int) -> None:
    over_kernels, plain = results("triton", images, device), results("reference", images, device)
    assert len(over_kernels) == len(plain) == 2 + len(list(Resampler(CONFIG).parameters()))
    for mine, expected in zip(over_kernels, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
