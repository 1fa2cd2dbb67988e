"""What the ranks of a step have to agree on before it is computed: whose samples are damaged, what a token counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.batch import TextBatch
from megavlm.data.loader import Damage, StepBatches
from megavlm.parallel.groups import Groups


def settle(found: StepBatches, groups: Groups, stream_weights: Sequence[float]) -> tuple[list[TextBatch], list[Damage]]:
    """The step's batches, each token with its weight; and the damage that any rank of the model-parallel group saw.

    The loss is the sum over streams of weight x (mean over the stream's target tokens in the global batch). It is
    computed as one mean over all target tokens, so a stream's tokens weigh more where it has fewer of them.
    """
    damaged = _damage_of_all(found, groups)
    batches = [
        _without(batch, [one.document for one in damaged if one.row == row]) for row, batch in enumerate(found.batches)
    ]
    streams = [
        _stream_of_tokens(batch, [name.stream for name in names])
        for batch, names in zip(batches, found.samples, strict=True)
    ]
    if len(stream_weights) == 1:
        factors = torch.tensor(stream_weights, dtype=torch.float32)
    else:
        factors = _factors(batches, streams, groups, stream_weights)
    weighted = [
        replace(batch, loss_weights=batch.loss_weights * factors[of_token])
        for batch, of_token in zip(batches, streams, strict=True)
    ]
    return weighted, damaged


def _damage_of_all(found: StepBatches, groups: Groups) -> list[Damage]:
    """One for each sample. The messages are collected only in steps that have any, which one number tells."""
    count = torch.tensor([len(found.damaged)], device=groups.device)
    dist.all_reduce(count, group=groups.collection.mp)
    if int(count) == 0:
        return []
    seen: list[list[Damage]] = [[] for _ in range(groups.collection.mp.size())]
    dist.all_gather_object(seen, found.damaged, group=groups.collection.mp)
    return list({(one.row, one.document): one for of_rank in seen for one in of_rank}.values())


def _without(batch: TextBatch, documents: Sequence[int]) -> TextBatch:
    """The batch in which nothing of these documents is trained."""
    if not documents:
        return batch
    assert batch.cu_seqlens is not None
    weights = batch.loss_weights.clone()
    for document in documents:
        weights[:, int(batch.cu_seqlens[document]) : int(batch.cu_seqlens[document + 1])] = 0
    return replace(batch, loss_weights=weights)


def _stream_of_tokens(batch: TextBatch, streams: Sequence[int]) -> Tensor:
    """[1, length]: the stream of each token; padding counts as the first one's, and weighs nothing."""
    assert batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff()
    of_document = torch.zeros(len(lengths), dtype=torch.int64)
    of_document[: len(streams)] = torch.tensor(streams, dtype=torch.int64)
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
