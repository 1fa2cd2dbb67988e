"""A kernel launch as a value, so that what is compiled and measured without a GPU is exactly what runs on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One call of a Triton kernel: `arguments` (tensors, numbers) by name, then compile-time `constants`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        if all(self.grid):
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """`<name>_row`, the one stride that a kernel needs of a packed [rows, heads, d] tensor with dense heads."""
    return {f"{name}_row": tensor.stride(0) for name, tensor in tensors.items()}


def with_dense_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where each row's heads lie side by side (half of a fused k-v projection does), else a copy."""
    heads, width = tensor.shape[-2:]
    is_dense = tensor.stride(-1) == 1 and (heads == 1 or tensor.stride(-2) == width)
    return tensor if is_dense else tensor.contiguous()


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that holds the number, kept within the two limits (powers of two themselves)."""
    return min(max(1 << max(number - 1, 0).bit_length(), least), most)


def attention_tiles(q: torch.Tensor, queries: int, keys: int) -> tuple[dict[str, int], int]:
    """(compile-time constants, warps) of a kernel that keeps a tile of queries and walks over keys.

    64 x 64 for heads of 64 in 16 bits; wider heads take half the keys, so that no kernel spills registers
    (resources.csv), and fp32, which has no tensor cores here, a quarter over twice the warps.
    """
    is_wide, is_float32 = q.shape[-1] > 64, q.element_size() == 4
    most_keys = 16 if is_float32 else 32 if is_wide else 64
    return _tiles(q, power_of_two(queries, 16, 64), power_of_two(keys, 16, most_keys)), 8 if is_float32 else 4


def key_gradient_tiles(q: torch.Tensor, queries: int, keys: int) -> tuple[dict[str, int], int]:
    """(compile-time constants, warps) of a kernel that keeps the gradients of a tile of keys and walks over queries."""
    is_wide, is_float32 = q.shape[-1] > 64, q.element_size() == 4
    most_keys = 16 if is_float32 else 64
    constants = _tiles(q, power_of_two(queries, 16, 32), power_of_two(keys, 16, most_keys))
    return constants, 8 if is_wide or is_float32 else 4


def _tiles(q: torch.Tensor, queries: int, keys: int) -> dict[str, int]:
    width = q.shape[-1]
    return {"D": width, "D_PAD": power_of_two(width, 16, 256), "BLOCK_Q": queries, "BLOCK_K": keys}
