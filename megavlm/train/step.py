"""One optimizer step: the microbatches through megatron-core's pipeline schedule, then the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megavlm.batch import TextBatch
from megavlm.parallel.groups import Groups


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank of the last pipeline stage, 0 elsewhere."""

    loss: float
    """Mean loss over the target tokens of the global batch."""
    target_tokens: int
    """Target tokens of the global batch."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    applied: bool
    """Whether the optimizer changed the weights."""


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Sequence[TextBatch],
    groups: Groups,
) -> StepResult:
    """Forward, backward and update over this data-parallel rank's microbatches."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = run_schedule(chunks, batches, groups)
    applied, grad_norm, _ = optimizer.step()
    loss, tokens = _reduce(sums, groups)
    return StepResult(loss, tokens, float(grad_norm or 0.0), bool(applied))


def run_schedule(
    chunks: Sequence[DistributedDataParallel], batches: Sequence[TextBatch], groups: Groups, forward_only: bool = False
) -> list[Tensor]:
    """All microbatches through all stages; on the last stage [sum of losses, target tokens] of each."""
    schedule = get_forward_backward_func()
    outputs = schedule(
        forward_step_func=_forward_step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.size(1),
        micro_batch_size=batches[0].tokens.size(0),
        forward_only=forward_only,
    )
    return [output["sum and tokens"] for output in outputs] if groups.is_last_stage else []


def _forward_step(batches: Iterator[TextBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
    batch = next(batches)
    losses = model(
        input_ids=batch.tokens,
        position_ids=None,
        attention_mask=None,
        labels=batch.labels,
        packed_seq_params=packed_rows(batch.cu_seqlens),
    )
    return losses, partial(_weighted_sum, batch)


def _weighted_sum(batch: TextBatch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of this microbatch's losses and the tokens it counts; megatron-core divides one sum by the other."""
    total = (losses * batch.loss_weights).sum()
    tokens = batch.target_tokens
    return total, tokens, {"sum and tokens": torch.stack([total.detach().double(), tokens.double()])}


def packed_rows(cu_seqlens: Tensor | None) -> PackedSeqParams | None:
    """How megatron-core is told where the documents of a row begin.

    `max_seqlen` must be the longest document, never the row: megatron-core takes a rotary table as long as the row
    for one that runs through all documents.
    """
    if cu_seqlens is None:
        return None
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _reduce(sums: list[Tensor], groups: Groups) -> tuple[float, int]:
    """(mean loss, target tokens) over the data-parallel ranks, where this rank's stage knows them."""
    if not groups.is_last_stage:
        return 0.0, 0
    total = torch.stack(sums).sum(0)
    dist.all_reduce(total, group=groups.collection.dp)
    return (total[0] / total[1].clamp(min=1)).item(), int(total[1])
