"""Latents inside the one tensor that travels between pipeline stages, as extra rows behind the text.

megatron-core's schedules carry one tensor and run backward through it alone; a second one would lose its gradient
without a word. Under sequence parallelism each rank packs its own slice of the latents behind its slice of the text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def append_latents(hidden: Tensor, latents: Tensor) -> Tensor:
    """hidden [s, b, h] and latents of any shape -> [s + rows, b, h], the last row filled up with zeros."""
    flat = latents.flatten()
    row = hidden.size(1) * hidden.size(2)
    rows = -(-flat.numel() // row)
    padded = F.pad(flat, (0, rows * row - flat.numel()))
    return torch.cat([hidden, padded.view(rows, *hidden.shape[1:])])


def split_latents(received: Tensor, text_length: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What `append_latents` joined: (hidden [s, b, h], latents of `shape`)."""
    hidden, rows = received[:text_length], received[text_length:]
    numbers = torch.Size(shape).numel()
    return hidden, rows.flatten()[:numbers].view(shape)
