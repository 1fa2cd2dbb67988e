"""Process groups from degrees: the only user of megatron-core's `parallel_state`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megavlm.errors import ConfigError, UnavailableError
from megavlm.parallel.layout import ParallelConfig
from megavlm.platform import machine


@dataclass(frozen=True)
class Groups:
    """This process's place in the layout, and the process groups it belongs to."""

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    collection: ProcessGroupCollection
    """The groups as megatron-core's modules take them."""

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def speaks(self) -> bool:
        """Whether this rank prints the training lines: the first of those that know the loss."""
        return self.is_last_stage and self.tensor_rank == 0 and self.data_rank == 0

    @property
    def holds_first_copy(self) -> bool:
        """Whether this rank belongs to the data-parallel copy that writes the weights out."""
        return self.data_rank == 0


def world_from_environment() -> tuple[int, int]:
    """(rank, number of processes) as torchrun says it; a single process without torchrun."""
    return _number("RANK", "0"), _number("WORLD_SIZE", "1")


def _number(variable: str, alone: str) -> int:
    text = os.environ.get(variable, alone)
    if not text.isdecimal():
        raise ConfigError(variable, text, "is no whole number", "start with torchrun, or unset it")
    return int(text)


def _take_gpu() -> None:
    """Each process has a GPU of its node to itself."""
    own, gpus = _number("LOCAL_RANK", "0"), torch.cuda.device_count()
    if own >= gpus:
        problem = f"has no GPU to itself: torch sees {gpus} here"
        remedy = f"start {gpus} processes a node, or hide GPUs by CUDA_VISIBLE_DEVICES= and run on CPUs"
        raise UnavailableError("LOCAL_RANK", own, problem, remedy)
    torch.cuda.set_device(own)


def join(timeout_minutes: float = ParallelConfig.distributed_timeout_minutes) -> int:
    """Join the other processes of the run, as torchrun lists them; return how many there are."""
    if dist.is_initialized():
        return dist.get_world_size()
    rank, world_size = world_from_environment()
    if machine.prepare().type == "cuda":
        _take_gpu()
    # Without torchrun there is no address to meet at, and nobody to meet.
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
    timeout = timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(machine.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        problem = f"is where rank {rank} did not meet {world_size - 1} others ({str(error).splitlines()[0]})"
        remedy = "give all processes the first node's name, the same free port, and each a RANK below WORLD_SIZE"
        raise UnavailableError("MASTER_ADDR:MASTER_PORT", place, problem, remedy) from error
    return world_size


def start(parallel: ParallelConfig, seed: int = 1234) -> Groups:
    """Build the groups over the joined processes and seed the generators. The layout must have been checked."""
    stages = parallel.pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else None
        ),
        # megatron-core makes a second, gloo, copy of each group for its own checkpoint gathers.
        create_gloo_process_groups=machine.backend() != "gloo",
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    seed_generators(seed)
    return Groups(
        device=machine.prepare(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=stages,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def seed_generators(seed: int) -> None:
    """Seed what dropout draws from; the groups must have been started.

    Dropout has to differ between stages and between data-parallel ranks. Tensor-parallel ranks share what they drop
    of a replicated residual; megatron-core tells them apart where each holds its own slice.
    """
    data_size = parallel_state.get_data_parallel_world_size()
    place = parallel_state.get_pipeline_model_parallel_rank() * data_size + parallel_state.get_data_parallel_rank()
    torch.manual_seed(seed + 10_000 * place)
    model_parallel_cuda_manual_seed(seed + 10_000 * place)


def stop() -> None:
    """Forget the groups; the processes stay joined and can start again with another layout."""
    parallel_state.destroy_model_parallel()


def can_leave_alone() -> bool:
    """Whether `leave` returns though other ranks are elsewhere, in a collective perhaps."""
    return not dist.is_initialized() or dist.get_world_size() == 1 or machine.backend() != "nccl"


def leave() -> None:
    """Forget the groups and the other processes: the last thing a process does, also after an error.

    A process that ends with gloo's threads running may abort instead of giving its exit code.
    """
    stop()
    if dist.is_initialized():
        dist.destroy_process_group()
