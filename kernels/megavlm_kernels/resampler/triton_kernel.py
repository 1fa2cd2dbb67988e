"""resampler_attention in Triton: flash attention over two key sources, with no atomics in the backward.

Everything is packed [rows, heads, d]: image i owns `latents` rows of queries and of latent keys, and rows
cu_seqlens[i] to cu_seqlens[i + 1] of media keys. One program has one image, one head and one tile of queries (forward,
grad_q) or walks over tiles of keys (grad_k, grad_v), so that each number is summed by one program in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megavlm_kernels.launch import Launch, attention_tiles, ceil_div, key_gradient_tiles, strides, with_dense_heads
from megavlm_kernels.tile import attend, finish, key_gradients, load_rows, query_gradient, store_rows


@triton.jit
def forward_kernel(
    q, k_media, v_media, k_latents, v_latents, cu_seqlens, out, logsumexp,
    q_row, k_media_row, v_media_row, k_latents_row, v_latents_row, out_row,
    latents, rows, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(0), tl.program_id(1)
    own = image * latents
    query = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keep_query = query < latents
    q_tile = load_rows(q + head * D, own + query, q_row, keep_query, D, D_PAD)
    acc = tl.zeros([BLOCK_Q, D_PAD], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    media_end = tl.load(cu_seqlens + image + 1)
    for begin in range(tl.load(cu_seqlens + image), media_end, BLOCK_K):
        key = begin + tl.arange(0, BLOCK_K)
        k = load_rows(k_media + head * D, key, k_media_row, key < media_end, D, D_PAD)
        v = load_rows(v_media + head * D, key, v_media_row, key < media_end, D, D_PAD)
        acc, top, total = attend(q_tile, k, v, key < media_end, scale_log2, acc, top, total)
    for begin in range(0, latents, BLOCK_K):
        key = begin + tl.arange(0, BLOCK_K)
        k = load_rows(k_latents + head * D, own + key, k_latents_row, key < latents, D, D_PAD)
        v = load_rows(v_latents + head * D, own + key, v_latents_row, key < latents, D, D_PAD)
        acc, top, total = attend(q_tile, k, v, key < latents, scale_log2, acc, top, total)
    acc, lse = finish(acc, top, total)
    store_rows(out + head * D, own + query, out_row, keep_query, acc, D, D_PAD)
    tl.store(logsumexp + head.to(tl.int64) * rows + own + query, lse, mask=keep_query)


@triton.jit
def grad_q_kernel(
    q, k_media, v_media, k_latents, v_latents, cu_seqlens, out, grad_out, logsumexp, delta, grad_q,
    q_row, k_media_row, v_media_row, k_latents_row, v_latents_row, out_row, grad_out_row, grad_q_row,
    latents, rows, scale, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Also stores delta = sum(grad_out * out) per query, which the key kernel needs."""
    image, head = tl.program_id(0), tl.program_id(1)
    own = image * latents
    query = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keep_query = query < latents
    statistics = head.to(tl.int64) * rows + own + query
    out_tile = load_rows(out + head * D, own + query, out_row, keep_query, D, D_PAD)
    do = load_rows(grad_out + head * D, own + query, grad_out_row, keep_query, D, D_PAD)
    delta_tile = tl.sum(out_tile.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + statistics, delta_tile, mask=keep_query)
    q_tile = load_rows(q + head * D, own + query, q_row, keep_query, D, D_PAD)
    lse = tl.load(logsumexp + statistics, mask=keep_query, other=0.0)
    acc = tl.zeros([BLOCK_Q, D_PAD], tl.float32)
    media_end = tl.load(cu_seqlens + image + 1)
    for begin in range(tl.load(cu_seqlens + image), media_end, BLOCK_K):
        key = begin + tl.arange(0, BLOCK_K)
        k = load_rows(k_media + head * D, key, k_media_row, key < media_end, D, D_PAD)
        v = load_rows(v_media + head * D, key, v_media_row, key < media_end, D, D_PAD)
        acc = query_gradient(q_tile, k, v, key < media_end, do, lse, delta_tile, scale_log2, acc)
    for begin in range(0, latents, BLOCK_K):
        key = begin + tl.arange(0, BLOCK_K)
        k = load_rows(k_latents + head * D, own + key, k_latents_row, key < latents, D, D_PAD)
        v = load_rows(v_latents + head * D, own + key, v_latents_row, key < latents, D, D_PAD)
        acc = query_gradient(q_tile, k, v, key < latents, do, lse, delta_tile, scale_log2, acc)
    store_rows(grad_q + head * D, own + query, grad_q_row, keep_query, acc * scale, D, D_PAD)


@triton.jit
def grad_kv_kernel(
    q, k, v, cu_seqlens, grad_out, logsumexp, delta, grad_k, grad_v,
    q_row, k_row, v_row, grad_out_row, grad_k_row, grad_v_row,
    latents, rows, scale, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One of the two key sources: media tokens, or with cu_seqlens = None the latents.

    The grid's third axis has as many programs as an image of average length has tiles; longer images walk further.
    """
    image, head = tl.program_id(0), tl.program_id(1)
    own = image * latents
    if cu_seqlens is None:
        first = own
        end = own + latents
    else:
        first = tl.load(cu_seqlens + image)
        end = tl.load(cu_seqlens + image + 1)
    for begin in range(first + tl.program_id(2) * BLOCK_K, end, tl.num_programs(2) * BLOCK_K):
        key = begin + tl.arange(0, BLOCK_K)
        keep_key = key < end
        k_tile = load_rows(k + head * D, key, k_row, keep_key, D, D_PAD)
        v_tile = load_rows(v + head * D, key, v_row, keep_key, D, D_PAD)
        acc_k = tl.zeros([BLOCK_K, D_PAD], tl.float32)
        acc_v = tl.zeros([BLOCK_K, D_PAD], tl.float32)
        for query_begin in range(0, latents, BLOCK_Q):
            query = query_begin + tl.arange(0, BLOCK_Q)
            keep_query = query < latents
            statistics = head.to(tl.int64) * rows + own + query
            q_tile = load_rows(q + head * D, own + query, q_row, keep_query, D, D_PAD)
            do = load_rows(grad_out + head * D, own + query, grad_out_row, keep_query, D, D_PAD)
            lse = tl.load(logsumexp + statistics, mask=keep_query, other=0.0)
            delta_tile = tl.load(delta + statistics, mask=keep_query, other=0.0)
            acc_k, acc_v = key_gradients(k_tile, v_tile, q_tile, do, lse, delta_tile, scale_log2, acc_k, acc_v)
        store_rows(grad_k + head * D, key, grad_k_row, keep_key, acc_k * scale, D, D_PAD)
        store_rows(grad_v + head * D, key, grad_v_row, keep_key, acc_v, D, D_PAD)


@dataclass(frozen=True)
class Inputs:
    """The op's inputs, packed: q, k_latents, v_latents [images * latents, heads, d]; media [tokens, heads, d]."""

    q: torch.Tensor
    k_media: torch.Tensor
    v_media: torch.Tensor
    k_latents: torch.Tensor
    v_latents: torch.Tensor
    cu_seqlens: torch.Tensor
    scale: float
    images: int
    latents: int

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k_media: torch.Tensor,
        v_media: torch.Tensor,
        k_latents: torch.Tensor,
        v_latents: torch.Tensor,
        cu_seqlens: torch.Tensor,
        scale: float,
    ) -> Inputs:
        dense = [with_dense_heads(tensor) for tensor in (q, k_media, v_media, k_latents, v_latents)]
        q, k_media, v_media, k_latents, v_latents = dense
        packed = (q.flatten(0, 1), k_media, v_media, k_latents.flatten(0, 1), v_latents.flatten(0, 1))
        return cls(*packed, cu_seqlens, scale, *q.shape[:2])

    @property
    def keys(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("k_media", "v_media", "k_latents", "v_latents")}

    @property
    def scales(self) -> dict[str, float]:
        return {"scale": self.scale, "scale_log2": self.scale * math.log2(math.e)}

    def per_tile(self) -> tuple[tuple[int, int, int], dict[str, int], int]:
        """(grid, compile-time constants, warps) of the kernels that have one tile of queries each."""
        constants, warps = attention_tiles(self.q, self.latents, ceil_div(self.k_media.shape[0], self.images))
        return (self.images, self.q.shape[1], ceil_div(self.latents, constants["BLOCK_Q"])), constants, warps


def forward_launch(inputs: Inputs, out: torch.Tensor, logsumexp: torch.Tensor) -> Launch:
    grid, constants, warps = inputs.per_tile()
    return Launch(
        kernel=forward_kernel,
        grid=grid,
        arguments={
            "q": inputs.q, **inputs.keys, "cu_seqlens": inputs.cu_seqlens, "out": out, "logsumexp": logsumexp,
            **strides(q=inputs.q, **inputs.keys, out=out),
            "latents": inputs.latents, "rows": inputs.q.shape[0], "scale_log2": inputs.scales["scale_log2"],
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
            "q": inputs.q, **inputs.keys, "cu_seqlens": inputs.cu_seqlens,
            "out": out, "grad_out": grad_out, "logsumexp": logsumexp, "delta": delta, "grad_q": grad_q,
            **strides(q=inputs.q, **inputs.keys, out=out, grad_out=grad_out, grad_q=grad_q),
            "latents": inputs.latents, "rows": inputs.q.shape[0], **inputs.scales,
        },
        constants=constants,
        num_warps=warps,
        num_stages=2,
    )  # fmt: skip


def grad_kv_launch(
    inputs: Inputs,
    source: str,
    grad_out: torch.Tensor,
    logsumexp: torch.Tensor,
    delta: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> Launch:
    """`source` is "media" or "latents"."""
    k, v = inputs.keys[f"k_{source}"], inputs.keys[f"v_{source}"]
    average = ceil_div(k.shape[0], inputs.images)
    constants, warps = key_gradient_tiles(inputs.q, inputs.latents, average)
    return Launch(
        kernel=grad_kv_kernel,
        grid=(inputs.images, inputs.q.shape[1], max(1, ceil_div(average, constants["BLOCK_K"]))),
        arguments={
            "q": inputs.q, "k": k, "v": v, "cu_seqlens": inputs.cu_seqlens if source == "media" else None,
            "grad_out": grad_out, "logsumexp": logsumexp, "delta": delta, "grad_k": grad_k, "grad_v": grad_v,
            **strides(q=inputs.q, k=k, v=v, grad_out=grad_out, grad_k=grad_k, grad_v=grad_v),
            "latents": inputs.latents, "rows": inputs.q.shape[0], **inputs.scales,
        },
        constants=constants,
        num_warps=warps,
        num_stages=2,
    )  # fmt: skip


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [images, latents, heads, d], base-2 logsumexp [heads, images * latents])."""
    rows, heads, width = inputs.q.shape
    out = torch.empty(rows, heads, width, dtype=inputs.q.dtype, device=inputs.q.device)
    logsumexp = torch.empty(heads, rows, dtype=torch.float32, device=inputs.q.device)
    if rows:
        forward_launch(inputs, out, logsumexp).run()
    return out.view(inputs.images, inputs.latents, heads, width), logsumexp


def backward(
    inputs: Inputs, out: torch.Tensor, logsumexp: torch.Tensor, grad_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k_media, v_media, k_latents and v_latents, each contiguous in its input's shape."""
    shape = out.shape
    out, grad_out = out.flatten(0, 1), with_dense_heads(grad_out).flatten(0, 1)
    wanted = (inputs.q, *inputs.keys.values())
    grads = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in wanted]
    grad_q, grad_k_media, grad_v_media, grad_k_latents, grad_v_latents = grads
    if inputs.q.shape[0]:
        delta = torch.empty_like(logsumexp)
        grad_q_launch(inputs, out, grad_out, logsumexp, delta, grad_q).run()
        grad_kv_launch(inputs, "media", grad_out, logsumexp, delta, grad_k_media, grad_v_media).run()
        grad_kv_launch(inputs, "latents", grad_out, logsumexp, delta, grad_k_latents, grad_v_latents).run()
    return grad_q.view(shape), grad_k_media, grad_v_media, grad_k_latents.view(shape), grad_v_latents.view(shape)
