"""Microbatches through the pipeline: megatron-core's schedules, called in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megavlm import ranges
from megavlm.batch import TextBatch
from megavlm.model.attention import PackedRows
from megavlm.parallel.groups import Groups

OutputFunction = Callable[[TextBatch, Tensor], Any]
"""What becomes of the last stage's output of one microbatch. In training: (sum of losses, target tokens, what
`run_schedule` returns of it). Without labels: whatever is to be kept of the logits."""

InputFunction = Callable[[Sequence[TextBatch]], Callable[[TextBatch], dict[str, Any]]]
"""Called with a step's batches, gives what a chunk's forward takes of each of them beside its text."""


def run_schedule(
    chunks: Sequence[nn.Module],
    batches: Sequence[TextBatch],
    output_function: OutputFunction,
    *,
    inputs: InputFunction | None = None,
    with_labels: bool = True,
    forward_only: bool = False,
) -> list[Any]:
    """All microbatches through all chunks, forward and backward; on the last stage what `output_function` kept of each.

    Without labels the last stage's output are logits, which are collected and not trained on.
    """

    def forward_step(iterator: Iterator[TextBatch], model: nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = model(
            input_ids=batch.tokens,
            position_ids=None,
            attention_mask=None,
            labels=batch.labels if with_labels else None,
            packed_seq_params=packed_rows(batch),
            **(beside_text(batch) if beside_text else {}),
        )
        return output, lambda result, non_loss_data=False: output_function(batch, result)

    beside_text = inputs(batches) if inputs else None
    interleaved = len(chunks) > 1
    schedule = get_forward_backward_func()
    kept: list[Any] = schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.size(1),
        micro_batch_size=batches[0].tokens.size(0),
        forward_only=forward_only or not with_labels,
        collect_non_loss_data=not with_labels,
    )
    return kept


@dataclass(frozen=True)
class GlobalLoss:
    """The loss of a global batch, on the last stage; elsewhere zeros."""

    loss: float
    """The mean over its target tokens, each with its weight."""
    target_tokens: int
    of_groups: list[tuple[float, int]]
    """Of each group of tokens: (sum of losses without weights, target tokens)."""
    first_bad: int | None
    """The first of this rank's microbatches whose loss is not finite."""


@dataclass(frozen=True)
class TokenGroups:
    """Tokens whose losses are also summed apart."""

    number: int
    """How many groups there are."""
    of_tokens: Sequence[Tensor]
    """[rows, length] of each microbatch: the group of each target token, -1 for all others."""


@ranges.named("forward-backward")
def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[TextBatch],
    groups: Groups,
    inputs: InputFunction | None = None,
    apart: TokenGroups | None = None,
) -> GlobalLoss:
    """Leave the gradient of the global batch's mean loss in `main_grad`; return that loss."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    return global_loss(run_schedule(chunks, batches, summed_losses(batches, apart), inputs=inputs), groups)


@torch.no_grad()
def forward_loss(
    chunks: Sequence[nn.Module],
    batches: Sequence[TextBatch],
    groups: Groups,
    inputs: InputFunction | None = None,
    apart: TokenGroups | None = None,
) -> GlobalLoss:
    """The loss alone."""
    sums = run_schedule(chunks, batches, summed_losses(batches, apart), inputs=inputs, forward_only=True)
    return global_loss(sums, groups)


def global_loss(sums: Sequence[Tensor], groups: Groups) -> GlobalLoss:
    """From what each microbatch of this data-parallel rank has summed, in one reduction."""
    if not groups.is_last_stage:
        return GlobalLoss(0.0, 0, [], None)
    mine = torch.stack(list(sums))
    total = mine.sum(0)
    dist.all_reduce(total, group=groups.collection.dp)
    loss, tokens, *apart = total.tolist()
    bad = None
    if not math.isfinite(loss):
        bad = next((number for number, one in enumerate(mine[:, 0].tolist()) if not math.isfinite(one)), None)
    of_groups = [(apart[number], int(apart[number + 1])) for number in range(0, len(apart), 2)]
    return GlobalLoss(loss / max(tokens, 1.0), int(tokens), of_groups, bad)


def summed_losses(batches: Sequence[TextBatch], apart: TokenGroups | None) -> OutputFunction:
    """What megatron-core takes of a microbatch: the sum of its losses and the tokens it counts, to divide by."""
    tokens_of = {} if apart is None else {id(one): tokens for one, tokens in zip(batches, apart.of_tokens, strict=True)}

    def summed(batch: TextBatch, losses: Tensor) -> tuple[Tensor, Tensor, Any]:
        total, tokens = (losses * batch.loss_weights).sum(), batch.target_tokens
        kept = [torch.stack([total.detach().double(), tokens.double()])]
        if apart is not None:
            kept.append(_sums_apart(losses.detach(), tokens_of[id(batch)], apart.number))
        return total, tokens, torch.cat(kept)

    return summed


def _sums_apart(losses: Tensor, group_of: Tensor, number: int) -> Tensor:
    """[2 * number]: of each group the sum of its losses, and how many they are."""
    counts = (group_of >= 0).flatten()
    groups = group_of.flatten()[counts]
    pairs = torch.stack([losses.flatten()[counts].double(), torch.ones_like(groups, dtype=torch.float64)], dim=1)
    return pairs.new_zeros(number, 2).index_add_(0, groups, pairs).flatten()


def packed_rows(batch: TextBatch) -> PackedRows | None:
    """How megatron-core is told where the documents of a row begin.

    `max_seqlen` must be the longest document, never the row: megatron-core takes a rotary table as long as the row
    for one that runs on through all documents.
    """
    if batch.cu_seqlens is None:
        return None
    lengths = tuple(batch.cu_seqlens.diff().tolist())
    starts = batch.cu_seqlens.to(batch.tokens.device, non_blocking=True)
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )
