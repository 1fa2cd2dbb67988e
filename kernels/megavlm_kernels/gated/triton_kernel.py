"""gated_residual in Triton: one pass over x and y forward, one over y and the gradient backward.

The gate's gradient is a sum over all elements: each program leaves its part in a buffer, and a last program adds the
parts in a fixed order, so that it has the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megavlm_kernels.launch import Launch, ceil_div, power_of_two

BLOCK_ELEMENTS = 4096
"""Of x in one program: 32 per thread at four warps, so that every load is 16 bytes wide in bf16."""


@triton.jit
def tanh(value):
    """In fp32; the series below 0.1, where the quotient would lose the digits of a gate near zero."""
    square = value * value
    near_zero = value * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    decay = tl.exp(-2 * tl.abs(value))
    quotient = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(value) < 0.1, near_zero, tl.where(value < 0, -quotient, quotient))


@triton.jit
def tanh_slope(value):
    """1 - tanh(value)^2, without the subtraction that cancels for gates far from zero."""
    decay = tl.exp(-2 * tl.abs(value))
    return 4 * decay / ((1 + decay) * (1 + decay))


@triton.jit
def forward_kernel(
    x, y, gate, flag, out, tokens,
    WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    keep = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    address = token.to(tl.int64)[:, None] * WIDTH + column[None, :]
    factor = tl.load(flag + token, mask=token < tokens, other=0).to(tl.float32) * tanh(tl.load(gate).to(tl.float32))
    x_tile = tl.load(x + address, mask=keep, other=0.0).to(tl.float32)
    y_tile = tl.load(y + address, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + address, (x_tile + factor[:, None] * y_tile).to(out.dtype.element_ty), mask=keep)


@triton.jit
def backward_kernel(
    y, gate, flag, grad_out, grad_y, parts, tokens,
    WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """grad_y, and this program's part of sum(flag * y * grad_out)."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    keep = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    address = token.to(tl.int64)[:, None] * WIDTH + column[None, :]
    flag_tile = tl.load(flag + token, mask=token < tokens, other=0).to(tl.float32)
    flagged = tl.load(grad_out + address, mask=keep, other=0.0).to(tl.float32) * flag_tile[:, None]
    y_tile = tl.load(y + address, mask=keep, other=0.0).to(tl.float32)
    grad_y_tile = flagged * tanh(tl.load(gate).to(tl.float32))
    tl.store(grad_y + address, grad_y_tile.to(grad_y.dtype.element_ty), mask=keep)
    tl.store(parts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(flagged * y_tile, 1), 0))


@triton.jit
def grad_gate_kernel(parts, gate, grad_gate, number, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, number, BLOCK):
        part = begin + tl.arange(0, BLOCK)
        total += tl.load(parts + part, mask=part < number, other=0.0)
    slope = tanh_slope(tl.load(gate).to(tl.float32))
    tl.store(grad_gate, (tl.sum(total, 0) * slope).to(grad_gate.dtype.element_ty))


def _blocks(tokens: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, compile-time constants)."""
    block_width = power_of_two(width, 16, 1024)
    block_tokens = power_of_two(tokens, 1, BLOCK_ELEMENTS // block_width)
    constants = {"WIDTH": width, "BLOCK_TOKENS": block_tokens, "BLOCK_WIDTH": block_width}
    return (ceil_div(tokens, block_tokens), ceil_div(width, block_width)), constants


def forward_launch(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, flag: torch.Tensor, out: torch.Tensor
) -> Launch:
    grid, constants = _blocks(*x.shape)
    arguments = {"x": x, "y": y, "gate": gate, "flag": flag, "out": out, "tokens": x.shape[0]}
    return Launch(forward_kernel, grid, arguments, constants, num_warps=4, num_stages=1)


def backward_launch(
    y: torch.Tensor,
    gate: torch.Tensor,
    flag: torch.Tensor,
    grad_out: torch.Tensor,
    grad_y: torch.Tensor,
    parts: torch.Tensor,
) -> Launch:
    grid, constants = _blocks(*y.shape)
    arguments = {
        "y": y, "gate": gate, "flag": flag, "grad_out": grad_out, "grad_y": grad_y, "parts": parts,
        "tokens": y.shape[0],
    }  # fmt: skip
    return Launch(backward_kernel, grid, arguments, constants, num_warps=4, num_stages=1)


def grad_gate_launch(parts: torch.Tensor, gate: torch.Tensor, grad_gate: torch.Tensor) -> Launch:
    arguments = {"parts": parts, "gate": gate, "grad_gate": grad_gate, "number": parts.shape[0]}
    return Launch(grad_gate_kernel, (1,), arguments, {"BLOCK": 1024}, num_warps=4, num_stages=1)


def number_of_parts(tokens: int, width: int) -> int:
    grid, _ = _blocks(tokens, width)
    return grid[0] * grid[1]


def forward(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    forward_launch(x, y, gate, flag, out).run()
    return out


def backward(
    y: torch.Tensor, gate: torch.Tensor, flag: torch.Tensor, grad_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of y and of the gate; that of x is grad_out itself."""
    grad_y, grad_gate = torch.empty_like(y), torch.empty_like(gate)
    parts = torch.empty(number_of_parts(*y.shape), dtype=torch.float32, device=y.device)
    backward_launch(y, gate, flag, grad_out, grad_y, parts).run()
    grad_gate_launch(parts, gate, grad_gate).run()
    return grad_y, grad_gate
