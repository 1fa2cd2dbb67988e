"""Gradients of all pipeline stages together, as the tensors of a Hugging Face folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megavlm.build.families import state_map_of
from megavlm.build.run_config import RunConfig
from megavlm.export.hf_export import folder_tensors
from megavlm.parallel.groups import Groups


def gradients(chunks: Any, run: RunConfig, groups: Groups) -> dict[str, Tensor]:
    """Of all stages, on every rank that holds the first tensor-parallel slice."""
    trained = [chunk for chunk in chunks if any(p.requires_grad for p in chunk.parameters())]
    mine = dict(folder_tensors(trained, state_map_of(run), groups.collection.tp, _gradient_of))
    stages: list[dict[str, Tensor]] = [{}] * groups.world_size
    torch.distributed.all_gather_object(stages, mine)
    return {name: value for stage in stages for name, value in stage.items()}


def _gradient_of(parameter: Any) -> Tensor:
    return parameter.main_grad.clone() if parameter.requires_grad else torch.zeros_like(parameter)
