"""The two sides of a training step: ours as every run takes it, theirs as one writes it in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.batch import IGNORED, TextBatch
from megavlm.bench.harness import Side, timed
from megavlm.build.model import Model
from megavlm.build.run_config import OptimizerConfig, RunConfig
from megavlm.parallel.groups import Groups
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.train.optim import build_optimizer
from megavlm.train.step import train_step


def our_side(model: Model, run: RunConfig, groups: Groups, steps: Iterator[Sequence[TextBatch]]) -> Side:
    """Pipeline schedule, megatron-core's DDP, gradient finalisation, clipping, distributed optimizer."""
    wrapped = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, _ = build_optimizer(wrapped, run)

    def step(batches: Sequence[TextBatch]) -> float:
        loss = train_step(wrapped, optimizer, batches, groups, model.inputs).loss
        _settle(groups.device)
        return loss

    def timed_step() -> Any:
        batches = [batch.to(groups.device) for batch in next(steps)]
        _settle(groups.device)
        return timed(lambda: step(batches))

    return Side("megavlm", timed_step)


def their_side(
    model: Any,
    settings: OptimizerConfig,
    device: torch.device,
    steps: Iterator[Sequence[Mapping[str, Tensor]]],
    autocast: torch.dtype | None = None,
) -> Side:
    """transformers' model in the shortest loop that does the same; of AdamW's variants the fused one is the fastest.

    With `autocast` float32 weights are multiplied in that format, as transformers' own Trainer does it.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        fused=True,
    )

    def step(batches: Sequence[Mapping[str, Tensor]], targets: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for given in batches:
            with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                loss = model(**given, use_cache=False, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        optimizer.step()
        _settle(device)
        return total.item()

    def timed_step() -> Any:
        batches = [{name: tensor.to(device) for name, tensor in given.items()} for given in next(steps)]
        # The first token of a sample is no target: nothing comes before it.
        targets = torch.stack([(given["labels"][:, 1:] != IGNORED).sum() for given in batches]).sum()
        _settle(device)
        return timed(lambda: step(batches, targets))

    return Side("transformers", timed_step)


def _settle(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
