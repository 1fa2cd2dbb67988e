"""What the ranks of a step have to agree on before it is computed: whose samples are damaged, what a token counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.batch import TextBatch
from megavlm.data.loader import Damage, StepBatches
from megavlm.parallel.groups import Groups


@dataclass(frozen=True)
class Settled:
    """A step as it is computed."""

    batches: list[TextBatch]
    """Each token with its weight."""
    source_of_tokens: list[Tensor]
    """[1, length] of each batch: the number of the source of each target token, -1 for all others."""
    damaged: list[Damage]
    """What any rank of the model-parallel group saw."""
    damaged_everywhere: int
    """How many samples of the whole step cannot be read, the same number on all ranks."""


def settle(found: StepBatches, groups: Groups, stream_weights: Sequence[float], source_names: Sequence[str]) -> Settled:
    """The step's batches, and the damage in them.

    The loss is the sum over streams of weight x (mean over the stream's target tokens in the global batch). It is
    computed as one mean over all target tokens, so a stream's tokens weigh more where it has fewer of them.
    """
    damaged, damaged_everywhere = _damage_of_all(found, groups)
    batches = [
        _without(batch, [one.document for one in damaged if one.row == row]) for row, batch in enumerate(found.batches)
    ]
    number = {name: place for place, name in enumerate(source_names)}
    sources, streams = [], []
    for batch, names in zip(batches, found.samples, strict=True):
        of_token = _of_tokens(batch, [number[name.source] for name in names])
        sources.append(torch.where(batch.loss_weights > 0, of_token, -1))
        streams.append(_of_tokens(batch, [name.stream for name in names]))
    if len(stream_weights) == 1:
        factors = torch.tensor(stream_weights, dtype=torch.float32)
    else:
        factors = _factors(batches, streams, groups, stream_weights)
    weighted = [
        replace(batch, loss_weights=batch.loss_weights * factors[of_token])
        for batch, of_token in zip(batches, streams, strict=True)
    ]
    return Settled(weighted, sources, damaged, damaged_everywhere)


def _damage_of_all(found: StepBatches, groups: Groups) -> tuple[list[Damage], int]:
    """One for each sample of this data-parallel rank, and how many of all ranks' cannot be read.

    The messages are collected only in steps in which any rank has one, which one number tells.
    """
    count = torch.tensor([len(found.damaged)], device=groups.device)
    dist.all_reduce(count)
    if int(count) == 0:
        return [], 0
    seen: list[list[Damage]] = [[] for _ in range(groups.collection.mp.size())]
    dist.all_gather_object(seen, found.damaged, group=groups.collection.mp)
    damaged = list({(one.row, one.document): one for of_rank in seen for one in of_rank}.values())
    count.fill_(sum(not one.is_too_long for one in damaged))
    dist.all_reduce(count, group=groups.collection.dp)
    return damaged, int(count)


def _without(batch: TextBatch, documents: Sequence[int]) -> TextBatch:
    """The batch in which nothing of these documents is trained."""
    if not documents:
        return batch
    assert batch.cu_seqlens is not None
    weights = batch.loss_weights.clone()
    for document in documents:
        weights[:, int(batch.cu_seqlens[document]) : int(batch.cu_seqlens[document + 1])] = 0
    return replace(batch, loss_weights=weights)


def _of_tokens(batch: TextBatch, of_samples: Sequence[int]) -> Tensor:
    """[1, length]: of each token the number of its sample; padding has 0, and weighs nothing."""
    assert batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff()
    of_document = torch.zeros(len(lengths), dtype=torch.int64)
    of_document[: len(of_samples)] = torch.tensor(of_samples, dtype=torch.int64)
    return torch.repeat_interleave(of_document, lengths.long()).unsqueeze(0)


def _factors(
    batches: Sequence[TextBatch], streams: Sequence[Tensor], groups: Groups, stream_weights: Sequence[float]
) -> Tensor:
    """What a token of each stream counts, for the mean over all tokens that count."""
    weights = torch.tensor(stream_weights, dtype=torch.float64)
    counts = torch.zeros(len(stream_weights), dtype=torch.float64)
    for batch, of_token in zip(batches, streams, strict=True):
        counts += torch.bincount(of_token[batch.loss_weights > 0], minlength=len(counts))
    on_device = counts.to(groups.device)
    dist.all_reduce(on_device, group=groups.collection.dp)
    counts = on_device.cpu()
    total = counts[weights > 0].sum()
    return torch.where(counts > 0, weights * total / counts.clamp(min=1), 0.0).float()
