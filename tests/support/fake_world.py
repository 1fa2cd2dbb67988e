"""One process of a cluster of any size, without the others and without memory for tensors."""

from __future__ import annotations

import contextlib

import torch.distributed as dist
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavlm.platform import machine


def join_fake_world(world_size: int) -> None:
    """One process that believes in the others: collectives do nothing."""
    machine.prepare()
    # Comparing generator states reads numbers, which fake tensors have not.
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
