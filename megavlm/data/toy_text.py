"""Made-up text that a tiny decoder can learn, for the quickstart and for tests: counting with noise.

A row counts upwards from a random token by a stride that its first token names; one position in `NOISE` is random.
Row r of step s is a function of (seed, s, r) alone, so every layout sees the same rows.
"""

from __future__ import annotations

import numpy as np
import torch

from megavlm.batch import TextBatch, next_token_batch

STRIDES = 8
NOISE = 20


def toy_row(seed: int, step: int, row: int, length: int, vocab_size: int) -> np.ndarray:
    """One row of tokens."""
    draw = np.random.default_rng([seed, step, row])
    stride = int(draw.integers(1, STRIDES + 1))
    tokens = (draw.integers(vocab_size) + stride * np.arange(length)) % vocab_size
    noisy = draw.integers(NOISE, size=length) == 0
    tokens[noisy] = draw.integers(vocab_size, size=int(noisy.sum()))
    tokens[0] = stride % vocab_size
    return tokens


def toy_step(
    *,
    seed: int,
    step: int,
    global_batch_size: int,
    micro_batch_size: int,
    seq_length: int,
    vocab_size: int,
    data_rank: int,
    data_size: int,
) -> list[TextBatch]:
    """The microbatches of one step for one data-parallel rank: rows are dealt round about over the ranks."""
    rows = [toy_row(seed, step, row, seq_length, vocab_size) for row in range(data_rank, global_batch_size, data_size)]
    tokens = torch.from_numpy(np.stack(rows)).long()
    return [next_token_batch(part) for part in tokens.split(micro_batch_size)]
