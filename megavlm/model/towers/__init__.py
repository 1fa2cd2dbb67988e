"""Vision towers: patch rows in, features of each image out. Plain torch, never tensor-parallel."""

from __future__ import annotations

from torch import nn


def mark_vision_parallel(module: nn.Module) -> None:
    """Have the gradients of these parameters summed over the ranks that the images are dealt to."""
    for parameter in module.parameters():
        parameter.vision_parallel = True  # type: ignore[attr-defined]
