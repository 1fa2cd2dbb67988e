"""The two sides of a training step: ours as every run takes it, theirs as one writes it in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.batch import TextBatch
from megavlm.bench.harness import Side, timed
from megavlm.build.model import Model
from megavlm.build.run_config import RunConfig
from megavlm.parallel.groups import Groups
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.train.optim import build_optimizer
from megavlm.train.step import train_step


def our_side(model: Model, run: RunConfig, groups: Groups, batches: Iterator[TextBatch]) -> Side:
    """Pipeline schedule, megatron-core's DDP, gradient finalisation, clipping, distributed optimizer."""
    wrapped = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, _ = build_optimizer(wrapped, run)

    def step() -> Any:
        batch = next(batches).to(groups.device)
        return timed(lambda: train_step(wrapped, optimizer, [batch], groups, model.inputs).loss)

    return Side("megavlm", step)


def their_side(model: Any, run: RunConfig, groups: Groups, inputs: Iterator[Mapping[str, Tensor]]) -> Side:
    """transformers' model in the shortest loop that does the same; of AdamW's variants the fused one is the fastest."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = run.optimizer
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

    def step(given: Mapping[str, Tensor]) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**given, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        optimizer.step()
        return loss.item()

    def timed_step() -> Any:
        given = {name: tensor.to(groups.device) for name, tensor in next(inputs).items()}
        return timed(lambda: step(given))

    return Side("transformers", timed_step)
