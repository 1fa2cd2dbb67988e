"""One optimizer step: the microbatches through the pipeline, then the update, if all numbers are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megavlm.batch import TextBatch
from megavlm.parallel.groups import Groups
from megavlm.parallel.schedule import GlobalLoss, InputFunction, TokenGroups, forward_backward
from megavlm.parallel.wrap import gradient_norm, update_weights

LM_LOSS = "lm loss"
"""What Megatron's logs call the loss."""


@dataclass(frozen=True)
class Sources:
    """Which source each target token of a rank's microbatches comes from."""

    names: Sequence[str]
    of_tokens: Sequence[Tensor]
    """[rows, length] of each microbatch: a number of `names`, -1 where nothing is to be predicted."""


@dataclass(frozen=True)
class StepResult:
    """What a step did: the same on every rank, but for the losses, which are 0 on all but the last pipeline stage."""

    losses: Mapping[str, float]
    """`LM_LOSS`: the mean loss over the target tokens of the global batch. Then those of its sources, where asked for,
    under `LM_LOSS/NAME`; a source without target tokens in this batch has none."""
    target_tokens: int
    """Target tokens of the global batch."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    applied: bool
    """Whether the optimizer changed the weights: it does unless the loss or the norm is not finite."""
    loss_is_finite: bool
    first_bad: int | None
    """The first of this data-parallel rank's microbatches whose loss is not finite; the last stage alone knows it."""
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
    *,
    sources: Sources | None = None,
    stop: int = 0,
) -> StepResult:
    """Forward, backward and update over this data-parallel rank's microbatches.

    Where the loss or the gradient is not finite, no weight and nothing of the optimizer's state is touched.
    """
    # megatron-core's plain float32 optimizer leaves `main_grad` itself as `grad`, onto which backward would add.
    optimizer.zero_grad()
    found = forward_backward(chunks, batches, groups, inputs, token_groups(sources))
    # One small collective for all that the ranks have to agree on.
    agreed = torch.tensor([not math.isfinite(found.loss), stop, found.target_tokens], device=groups.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    is_bad, agreed_stop, target_tokens = agreed.tolist()
    norm = gradient_norm(optimizer)
    applied = not is_bad and math.isfinite(norm)
    if applied:
        update_weights(optimizer, norm)
    return StepResult(
        losses=named_losses(found, [] if sources is None else sources.names),
        target_tokens=target_tokens,
        grad_norm=norm,
        applied=applied,
        loss_is_finite=not is_bad,
        first_bad=found.first_bad,
        stop=agreed_stop,
    )


def token_groups(sources: Sources | None) -> TokenGroups | None:
    """The sources as groups of tokens; none where there is but one, whose loss is the whole one."""
    return None if sources is None or len(sources.names) < 2 else TokenGroups(len(sources.names), sources.of_tokens)


def named_losses(found: GlobalLoss, names: Sequence[str]) -> dict[str, float]:
    """The whole loss, and the mean of each source's own over its target tokens."""
    losses = {LM_LOSS: found.loss}
    for name, (total, tokens) in zip(names, found.of_groups, strict=False):
        if tokens:
            losses[f"{LM_LOSS}/{name}"] = total / tokens
    return losses
