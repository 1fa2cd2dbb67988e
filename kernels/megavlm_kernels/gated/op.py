"""gated_residual, the public function: checks, the choice of path, and autograd around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megavlm_kernels.checks import require, require_device, require_kernel_dtype
from megavlm_kernels.dispatch import takes_triton
from megavlm_kernels.gated.reference import gated_residual_reference


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
    """x + flag * tanh(gate) * y, where a token's flag says whether its sample has an image at all.

    x, y [tokens, width]; gate [1]; flag [tokens], bool or 0/1 in x's dtype (no gradient). Returns [tokens, width].
    """
    _check(x, y, gate, flag)
    if takes_triton(x):
        require_kernel_dtype(x=x, y=y)
        return _GatedResidual.apply(x, y, gate, flag)
    return gated_residual_reference(x, y, gate, flag)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        from megavlm_kernels.gated import triton_kernel

        y, flag = y.contiguous(), flag.contiguous()
        ctx.save_for_backward(y, gate, flag)
        return triton_kernel.forward(x.contiguous(), y, gate, flag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from megavlm_kernels.gated import triton_kernel

        y, gate, flag = ctx.saved_tensors
        grad_y, grad_gate = triton_kernel.backward(y, gate, flag, grad_out.contiguous())
        return grad_out, grad_y, grad_gate, None


def _check(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, flag: torch.Tensor) -> None:
    shape = tuple(x.shape)
    require(len(shape) == 2, "x.shape", shape, "give it as [tokens, width]")
    require(y.shape == x.shape, "y.shape", tuple(y.shape), f"it has to be that of x, {shape}")
    require(tuple(gate.shape) == (1,), "gate.shape", tuple(gate.shape), "it has to be (1,)")
    require(flag.shape == shape[:1], "flag.shape", tuple(flag.shape), f"it has to be {shape[:1]}")
    fits = flag.dtype in (torch.bool, x.dtype)
    require(fits, "flag.dtype", flag.dtype, f"use bool or the dtype of x, {x.dtype}")
    require_device(x.device, y=y, gate=gate, flag=flag)
