"""One process of a world whose other processes are not there: collectives leave tensors as they are.

What plans need to run one rank of any cluster on one machine, and the few places where megatron-core has to be told
what another rank would have said.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavlm.parallel import groups
from megavlm.platform import machine


@contextlib.contextmanager
def imagined_world(rank: int, world_size: int) -> Iterator[None]:
    """Within the block this process is that rank of so many; it must not have joined any others."""
    assert not dist.is_initialized(), "this process has joined others"
    machine.prepare()
    fork, gather, hook = CudaRNGStatesTracker.fork, dist.all_gather_object, sys.excepthook
    # Comparing generator states reads numbers, which tensors without data have not.
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    dist.all_gather_object = _says_the_same  # type: ignore[assignment]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        groups.leave()
        # Joining a world wraps it, to name the rank in every error: imagined here, and one more each time.
        sys.excepthook = hook
        CudaRNGStatesTracker.fork, dist.all_gather_object = fork, gather


def _says_the_same(found: list[Any], mine: Any, group: Any = None) -> None:
    """What `all_gather_object` gives where every rank says what this one does."""
    found[:] = [mine] * len(found)


@contextlib.contextmanager
def tensors_of_shape(shape: Sequence[int]) -> Iterator[None]:
    """Within the block every tensor that comes from another pipeline stage has this shape."""
    ask = P2PCommunicator._communicate_shapes

    def known(self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> tuple[Any, Any]:
        return (list(shape) if recv_prev else [0, 0, 0], list(shape) if recv_next else [0, 0, 0])

    P2PCommunicator._communicate_shapes = known
    try:
        yield
    finally:
        P2PCommunicator._communicate_shapes = ask


@contextlib.contextmanager
def some_layers(block: Any, chosen: Sequence[int]) -> Iterator[None]:
    """Within the block a chunk's transformer block runs only these of its layers, counted from 0 in the chunk."""
    layers, count = block.layers, block.num_layers_per_pipeline_rank
    assert isinstance(layers, nn.ModuleList)
    block.layers = nn.ModuleList(layers[number] for number in chosen)
    block.num_layers_per_pipeline_rank = len(chosen)
    try:
        yield
    finally:
        block.layers, block.num_layers_per_pipeline_rank = layers, count
