"""media_attention in Triton: tiles of tokens that share an image, taken from the schedule, with no atomics.

Packed [rows, heads, d]: tokens as rows of q, image i owning `latents` rows of k and v. A program of the forward and of
grad_q has one tile and one head, reads its tokens wherever they stand, and loops over one image's latents: over none of
them for tokens without an image, whose result is thereby zero. A program of grad_kv has one image's tile of latents and
walks over that image's tokens in their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megavlm_kernels.launch import Launch, attention_tiles, ceil_div, key_gradient_tiles, strides, with_dense_heads
from megavlm_kernels.media.schedule import MediaSchedule
from megavlm_kernels.tile import attend, finish, key_gradients, load_rows, query_gradient, store_rows


@triton.jit
def forward_kernel(
    q, k, v, order, tile_image, tile_begin, tile_end, out, logsumexp,
    q_row, k_row, v_row, out_row,
    latents, tokens, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    image = tl.load(tile_image + tile)
    position = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_Q)
    keep_token = position < tl.load(tile_end + tile)
    token = tl.load(order + position, mask=keep_token, other=0)
    q_tile = load_rows(q + head * D, token, q_row, keep_token, D, D_PAD)
    acc = tl.zeros([BLOCK_Q, D_PAD], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for begin in range(0, tl.where(image < 0, 0, latents), BLOCK_K):
        key = begin + tl.arange(0, BLOCK_K)
        row = image * latents + key
        k_tile = load_rows(k + head * D, row, k_row, key < latents, D, D_PAD)
        v_tile = load_rows(v + head * D, row, v_row, key < latents, D, D_PAD)
        acc, top, total = attend(q_tile, k_tile, v_tile, key < latents, scale_log2, acc, top, total)
    acc, lse = finish(acc, top, total)
    store_rows(out + head * D, token, out_row, keep_token, acc, D, D_PAD)
    tl.store(logsumexp + head.to(tl.int64) * tokens + token, lse, mask=keep_token)


@triton.jit
def grad_q_kernel(
    q, k, v, order, tile_image, tile_begin, tile_end, out, grad_out, logsumexp, delta, grad_q,
    q_row, k_row, v_row, out_row, grad_out_row, grad_q_row,
    latents, tokens, scale, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Also stores delta = sum(grad_out * out) per token, which the key kernel needs."""
    tile, head = tl.program_id(0), tl.program_id(1)
    image = tl.load(tile_image + tile)
    position = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_Q)
    keep_token = position < tl.load(tile_end + tile)
    token = tl.load(order + position, mask=keep_token, other=0)
    statistics = head.to(tl.int64) * tokens + token
    out_tile = load_rows(out + head * D, token, out_row, keep_token, D, D_PAD)
    do = load_rows(grad_out + head * D, token, grad_out_row, keep_token, D, D_PAD)
    delta_tile = tl.sum(out_tile.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + statistics, delta_tile, mask=keep_token)
    q_tile = load_rows(q + head * D, token, q_row, keep_token, D, D_PAD)
    lse = tl.load(logsumexp + statistics, mask=keep_token, other=0.0)
    acc = tl.zeros([BLOCK_Q, D_PAD], tl.float32)
    for begin in range(0, tl.where(image < 0, 0, latents), BLOCK_K):
        key = begin + tl.arange(0, BLOCK_K)
        row = image * latents + key
        k_tile = load_rows(k + head * D, row, k_row, key < latents, D, D_PAD)
        v_tile = load_rows(v + head * D, row, v_row, key < latents, D, D_PAD)
        acc = query_gradient(q_tile, k_tile, v_tile, key < latents, do, lse, delta_tile, scale_log2, acc)
    store_rows(grad_q + head * D, token, grad_q_row, keep_token, acc * scale, D, D_PAD)


@triton.jit
def grad_kv_kernel(
    q, k, v, order, starts, grad_out, logsumexp, delta, grad_k, grad_v,
    q_row, k_row, v_row, grad_out_row, grad_k_row, grad_v_row,
    latents, tokens, scale, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(0), tl.program_id(1)
    key = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    keep_key = key < latents
    row = image.to(tl.int64) * latents + key
    k_tile = load_rows(k + head * D, row, k_row, keep_key, D, D_PAD)
    v_tile = load_rows(v + head * D, row, v_row, keep_key, D, D_PAD)
    acc_k = tl.zeros([BLOCK_K, D_PAD], tl.float32)
    acc_v = tl.zeros([BLOCK_K, D_PAD], tl.float32)
    end = tl.load(starts + image + 1)
    for begin in range(tl.load(starts + image), end, BLOCK_Q):
        position = begin + tl.arange(0, BLOCK_Q)
        keep_token = position < end
        token = tl.load(order + position, mask=keep_token, other=0)
        statistics = head.to(tl.int64) * tokens + token
        q_tile = load_rows(q + head * D, token, q_row, keep_token, D, D_PAD)
        do = load_rows(grad_out + head * D, token, grad_out_row, keep_token, D, D_PAD)
        lse = tl.load(logsumexp + statistics, mask=keep_token, other=0.0)
        delta_tile = tl.load(delta + statistics, mask=keep_token, other=0.0)
        acc_k, acc_v = key_gradients(k_tile, v_tile, q_tile, do, lse, delta_tile, scale_log2, acc_k, acc_v)
    store_rows(grad_k + head * D, row, grad_k_row, keep_key, acc_k * scale, D, D_PAD)
    store_rows(grad_v + head * D, row, grad_v_row, keep_key, acc_v, D, D_PAD)


@dataclass(frozen=True)
class Inputs:
    """The op's inputs, packed: q [tokens, heads, d]; k, v [images * latents, heads, d]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    schedule: MediaSchedule
    scale: float
    images: int
    latents: int

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: MediaSchedule, scale: float) -> Inputs:
        q, k, v = with_dense_heads(q), with_dense_heads(k), with_dense_heads(v)
        return cls(q, k.flatten(0, 1), v.flatten(0, 1), schedule, scale, *k.shape[:2])

    @property
    def scales(self) -> dict[str, float]:
        return {"scale": self.scale, "scale_log2": self.scale * math.log2(math.e)}

    @property
    def tiles(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self.schedule, name) for name in ("order", "tile_image", "tile_begin", "tile_end")}

    def per_tile(self) -> tuple[tuple[int, int], dict[str, int], int]:
        """(grid, compile-time constants, warps) of the kernels that have one tile of tokens each."""
        constants, warps = attention_tiles(self.q, self.schedule.block, self.latents)
        return (self.schedule.tile_image.shape[0], self.q.shape[1]), constants, warps


def forward_launch(inputs: Inputs, out: torch.Tensor, logsumexp: torch.Tensor) -> Launch:
    grid, constants, warps = inputs.per_tile()
    return Launch(
        kernel=forward_kernel,
        grid=grid,
        arguments={
            "q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.tiles, "out": out, "logsumexp": logsumexp,
            **strides(q=inputs.q, k=inputs.k, v=inputs.v, out=out),
            "latents": inputs.latents, "tokens": inputs.q.shape[0], "scale_log2": inputs.scales["scale_log2"],
        },
        constants=constants,
        num_warps=warps,
        num_stages=2,
    )  # fmt: skip


def grad_q_launch(
    inputs: Inputs,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    logsumexp: torch.Tensor,
    delta: torch.Tensor,
    grad_q: torch.Tensor,
) -> Launch:
    grid, constants, warps = inputs.per_tile()
    return Launch(
        kernel=grad_q_kernel,
        grid=grid,
        arguments={
            "q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.tiles,
            "out": out, "grad_out": grad_out, "logsumexp": logsumexp, "delta": delta, "grad_q": grad_q,
            **strides(q=inputs.q, k=inputs.k, v=inputs.v, out=out, grad_out=grad_out, grad_q=grad_q),
            "latents": inputs.latents, "tokens": inputs.q.shape[0], **inputs.scales,
        },
        constants=constants,
        num_warps=warps,
        num_stages=2,
    )  # fmt: skip


def grad_kv_launch(
    inputs: Inputs,
    grad_out: torch.Tensor,
    logsumexp: torch.Tensor,
    delta: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> Launch:
    average = ceil_div(inputs.q.shape[0], max(inputs.images, 1))
    constants, warps = key_gradient_tiles(inputs.q, average, inputs.latents)
    return Launch(
        kernel=grad_kv_kernel,
        grid=(inputs.images, inputs.q.shape[1], ceil_div(inputs.latents, constants["BLOCK_K"])),
        arguments={
            "q": inputs.q, "k": inputs.k, "v": inputs.v,
            "order": inputs.schedule.order, "starts": inputs.schedule.starts,
            "grad_out": grad_out, "logsumexp": logsumexp, "delta": delta, "grad_k": grad_k, "grad_v": grad_v,
            **strides(q=inputs.q, k=inputs.k, v=inputs.v, grad_out=grad_out, grad_k=grad_k, grad_v=grad_v),
            "latents": inputs.latents, "tokens": inputs.q.shape[0], **inputs.scales,
        },
        constants=constants,
        num_warps=warps,
        num_stages=2,
    )  # fmt: skip


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [tokens, heads, d], base-2 logsumexp [heads, tokens])."""
    tokens, heads, width = inputs.q.shape
    out = torch.empty(tokens, heads, width, dtype=inputs.q.dtype, device=inputs.q.device)
    logsumexp = torch.empty(heads, tokens, dtype=torch.float32, device=inputs.q.device)
    forward_launch(inputs, out, logsumexp).run()
    return out, logsumexp


def backward(
    inputs: Inputs, out: torch.Tensor, logsumexp: torch.Tensor, grad_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each contiguous in its input's shape."""
    grad_out = with_dense_heads(grad_out)
    delta = torch.empty_like(logsumexp)
    wanted = (inputs.q, inputs.k, inputs.v)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted)
    grad_q_launch(inputs, out, grad_out, logsumexp, delta, grad_q).run()
    grad_kv_launch(inputs, grad_out, logsumexp, delta, grad_k, grad_v).run()
    per_image = (inputs.images, inputs.latents)
    return grad_q, grad_k.unflatten(0, per_image), grad_v.unflatten(0, per_image)
