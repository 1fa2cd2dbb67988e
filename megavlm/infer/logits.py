"""The logits of a model under its layout, as one process would give them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavlm.batch import TextBatch
from megavlm.parallel.groups import Groups
from megavlm.parallel.schedule import InputFunction, run_schedule


@torch.no_grad()
def compute_logits(
    chunks: Sequence[nn.Module],
    batches: Sequence[TextBatch],
    groups: Groups,
    vocab_size: int,
    inputs: InputFunction | None = None,
) -> list[Tensor]:
    """[rows, length, vocabulary] of each microbatch on every rank of the last stage, padding stripped; else none."""
    slices = run_schedule(chunks, batches, _keep, inputs=inputs, with_labels=False)
    return [_gather_vocabulary(part, groups.collection.tp)[..., :vocab_size] for part in slices]


def _keep(batch: TextBatch, logits: Tensor) -> Tensor:
    return logits


def _gather_vocabulary(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
