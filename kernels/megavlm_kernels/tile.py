"""The arithmetic of one attention tile, shared by the attention kernels: load, online softmax, recomputing backward.

Scores are kept in base 2 (scale_log2 = scale * log2 e), as exp2 is what the hardware has. Rows and columns beyond the
end are loaded as zeros: they change no sum, except that zero keys would get weight, so keys alone need a mask. In
key_gradients the rows of keys beyond the end may overflow; each stays by itself, and none is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, row_stride, keep, D: tl.constexpr, D_PAD: tl.constexpr):
    """[rows, D_PAD] from a matrix with dense rows of D; 64-bit offsets, as 10,000 images pass 2^31 elements."""
    columns = tl.arange(0, D_PAD)
    address = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(address, mask=keep[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, row_stride, keep, values, D: tl.constexpr, D_PAD: tl.constexpr):
    columns = tl.arange(0, D_PAD)
    address = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(address, values.to(base.dtype.element_ty), mask=keep[:, None] & (columns < D)[None, :])


@triton.jit
def attend(q, k, v, keep_key, scale_log2, out, top, total):
    """One step of the online softmax over a tile of keys: the new (out, top, total); at least one key is kept."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    scores = tl.where(keep_key[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return out, new_top, total


@triton.jit
def finish(out, top, total):
    """(normalised output, base-2 logsumexp); a row without keys gives exact zeros."""
    total = tl.where(total > 0, total, 1.0)
    return out / total[:, None], tl.where(top > float("-inf"), top + tl.log2(total), 0.0)


@triton.jit
def query_gradient(q, k, v, keep_key, grad_out, logsumexp, delta, scale_log2, grad_q):
    """Adds this tile of keys to grad_q, which still lacks the factor `scale`."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    weights = tl.where(keep_key[None, :], tl.exp2(scores - logsumexp[:, None]), 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")


@triton.jit
def key_gradients(k, v, q, grad_out, logsumexp, delta, scale_log2, grad_k, grad_v):
    """Adds this tile of queries to (grad_k, grad_v); grad_k still lacks the factor `scale`."""
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
    weights = tl.exp2(scores - logsumexp[None, :])
    grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
    grad_weights = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    return grad_k, grad_v
