"""What a checkpoint is made from and fills again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megavlm.model.state_map import StateMap
from megavlm.parallel.groups import Groups


@dataclass(frozen=True)
class TrainState:
    """This process's part of a run in training."""

    chunks: Sequence[DistributedDataParallel]
    """The pipeline chunks; their trainable parameters are written with each checkpoint."""
    optimizer: MegatronOptimizer
    """Over those parameters, distributed or not."""
    scheduler: OptimizerParamScheduler
    """Of the learning rate."""
    groups: Groups
    """This process's place."""
    parts: Sequence[nn.Module]
    """All that holds weights here, under the names of the state map; the frozen ones are written once."""
    state_map: StateMap
    """How frozen weights are called in a folder."""
    run: Mapping[str, Any]
    """The resolved settings, as plain data: kept with each checkpoint."""
    identity: Mapping[str, Any]
    """What must be equal in a checkpoint that this run goes on from, as plain data."""
    seed: int
    """Of dropout, where a checkpoint's generators cannot be taken over."""

    @property
    def layout(self) -> dict[str, int]:
        """The place of each rank: generators belong to it."""
        return {
            "world_size": self.groups.world_size,
            "tensor": self.groups.collection.tp.size(),
            "pipeline": self.groups.pipeline_size,
            "data": self.groups.data_size,
        }
