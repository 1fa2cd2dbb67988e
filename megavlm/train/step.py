"""One optimizer step: the microbatches through the pipeline, then the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megavlm.batch import TextBatch
from megavlm.parallel.groups import Groups
from megavlm.parallel.schedule import InputFunction, forward_backward


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
    # megatron-core's plain float32 optimizer leaves `main_grad` itself as `grad`, onto which backward would add.
    optimizer.zero_grad()
    loss, tokens = forward_backward(chunks, batches, groups, inputs)
    applied, grad_norm, _ = optimizer.step()
    return StepResult(loss, tokens, float(grad_norm or 0.0), bool(applied))
