"""gated_residual in plain PyTorch: the truth that the kernel is held against, and what the CPU runs."""

from __future__ import annotations

import torch


def gated_residual_reference(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
    """Shapes as in `op.gated_residual`; autograd gives the backward."""
    return x + flag[:, None].to(x.dtype) * torch.tanh(gate).to(x.dtype) * y
