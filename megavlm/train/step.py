"""One optimizer step: the microbatches through the pipeline, then the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megavlm.batch import TextBatch
from megavlm.parallel.groups import Groups
from megavlm.parallel.schedule import InputFunction, forward_backward

LM_LOSS = "lm loss"
"""What Megatron's logs call the loss."""


@dataclass(frozen=True)
class StepResult:
    """What a step did: the same on every rank, but for the losses, which are 0 on all but the last pipeline stage."""

    losses: Mapping[str, float]
    """`LM_LOSS`: the mean loss over the target tokens of the global batch."""
    target_tokens: int
    """Target tokens of the global batch."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    applied: bool
    """Whether the optimizer changed the weights."""
    stop: int
    """The largest number that any rank gave as its reason to stop; 0: none did."""

    @property
    def loss(self) -> float:
        return self.losses[LM_LOSS]


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Sequence[TextBatch],
    groups: Groups,
    inputs: InputFunction | None = None,
    stop: int = 0,
) -> StepResult:
    """Forward, backward and update over this data-parallel rank's microbatches."""
    # megatron-core's plain float32 optimizer leaves `main_grad` itself as `grad`, onto which backward would add.
    optimizer.zero_grad()
    loss, tokens = forward_backward(chunks, batches, groups, inputs)
    # One small collective for all that the ranks have to agree on.
    agreed = torch.tensor([tokens, stop], device=groups.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    target_tokens, agreed_stop = agreed.tolist()
    applied, grad_norm, _ = optimizer.step()
    return StepResult({LM_LOSS: loss}, target_tokens, float(grad_norm or 0.0), bool(applied), agreed_stop)
