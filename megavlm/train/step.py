"""One optimizer step: the microbatches through the pipeline, then the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megavlm.batch import TextBatch
from megavlm.parallel.groups import Groups
from megavlm.parallel.schedule import InputFunction, run_schedule


@dataclass(frozen=True)
class StepResult:
    """What a step did; loss and tokens are 0 on all but the last pipeline stage."""

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
    inputs: InputFunction | None = None,
) -> StepResult:
    """Forward, backward and update over this data-parallel rank's microbatches."""
    loss, tokens = forward_backward(chunks, batches, groups, inputs)
    applied, grad_norm, _ = optimizer.step()
    return StepResult(loss, tokens, float(grad_norm or 0.0), bool(applied))


def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[TextBatch],
    groups: Groups,
    inputs: InputFunction | None = None,
) -> tuple[float, int]:
    """Leave the gradient of the global batch's mean loss in `main_grad`; return that loss and its target tokens."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    sums = run_schedule(chunks, batches, _weighted_sum, inputs=inputs)
    if not groups.is_last_stage:
        return 0.0, 0
    total = torch.stack(sums).sum(0)
    dist.all_reduce(total, group=groups.collection.dp)
    return (total[0] / total[1].clamp(min=1)).item(), int(total[1])


def _weighted_sum(batch: TextBatch, losses: Tensor) -> tuple[Tensor, Tensor, Any]:
    """The sum of this microbatch's losses and the tokens it counts; megatron-core divides one sum by the other."""
    total = (losses * batch.loss_weights).sum()
    tokens = batch.target_tokens
    return total, tokens, torch.stack([total.detach().double(), tokens.double()])
