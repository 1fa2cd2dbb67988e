"""Microbatches through the pipeline: megatron-core's schedules, called in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megavlm.batch import TextBatch
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
            packed_seq_params=packed_rows(batch.cu_seqlens),
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


def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[TextBatch],
    groups: Groups,
    inputs: InputFunction | None = None,
) -> tuple[float, int]:
    """Leave the gradient of the global batch's mean loss in `main_grad`; return that loss and its target tokens."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    sums = run_schedule(chunks, batches, weighted_sum, inputs=inputs)
    if not groups.is_last_stage:
        return 0.0, 0
    total = torch.stack(sums).sum(0)
    dist.all_reduce(total, group=groups.collection.dp)
    return (total[0] / total[1].clamp(min=1)).item(), int(total[1])


def weighted_sum(batch: TextBatch, losses: Tensor) -> tuple[Tensor, Tensor, Any]:
    """The sum of this microbatch's losses and the tokens it counts; megatron-core divides one sum by the other."""
    total = (losses * batch.loss_weights).sum()
    tokens = batch.target_tokens
    return total, tokens, torch.stack([total.detach().double(), tokens.double()])


def packed_rows(cu_seqlens: Tensor | None) -> PackedSeqParams | None:
    """How megatron-core is told where the documents of a row begin.

    `max_seqlen` must be the longest document, never the row: megatron-core takes a rotary table as long as the row
    for one that runs on through all documents.
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
