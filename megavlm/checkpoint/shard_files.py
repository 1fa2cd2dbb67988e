"""The files of megatron-core's `torch_dist` format, written in this process.

megatron-core's own writer forks processes and talks to them through a manager process, which takes 6 to 12 s to start,
leaves orphans behind a killed rank, and hangs all ranks where one of them cannot write. Here planning is the
collective part and touches no file; writing is local, can run in a thread, and sums each file as it goes; what went
wrong is told to all ranks before the next collective.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factories
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from megavlm.checkpoint.restricted_pickle import COMMON_FILE, METADATA_FILE, metadata_bytes
from megavlm.checkpoint.sealed import FileEntry, HashedFile, write_file

CONFIG_FILE = "metadata.json"


@dataclass(frozen=True)
class Plan:
    """What this rank will write."""

    items: Sequence[tuple[WriteItem, Tensor]]
    metadata: Metadata | None
    """The list of all ranks' tensors, on rank 0."""


@dataclass(frozen=True)
class Written:
    """What this rank has written: plain values, to be gathered."""

    files: Mapping[str, FileEntry]
    places: Sequence[tuple[MetadataIndex, _StorageInfo]]


def plan_files(tensors: Iterable[ShardedBase]) -> Plan:
    """Agree with the other ranks on who writes what; each tensor must be given on one rank only."""
    # Numbered, for the tensors' own keys may occur twice.
    state = {str(number): tensor for number, tensor in enumerate(tensors)}
    apply_factories(state)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(state, True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    rank = dist.get_rank()
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=rank == 0)
    local = planner.create_local_plan()
    plans = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(local, plans, dst=0)
    metadata = planner.create_global_plan(plans)[1] if rank == 0 else None
    local = planner.finish_plan(planner.create_decentralized_global_plan(local))
    return Plan([(item, planner.resolve_data(item)) for item in local.items], metadata)


def write_shards(plan: Plan, folder: Path, rank: int) -> Written:
    """Write this rank's tensors into one file; an OSError says what went wrong."""
    name = f"__{rank}_0.distcp"
    if not plan.items:
        return Written({}, [])
    places = []
    file = HashedFile(folder / name)
    try:
        for item, tensor in plan.items:
            start = file.tell()
            # A view would take its whole storage along.
            is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
            torch.save(tensor.detach().to("cpu", copy=is_view), file)  # type: ignore[arg-type]
            places.append((item.index, _StorageInfo(name, start, file.tell() - start)))
        return Written({name: file.close()}, places)
    except OSError:
        file.abandon()
        raise
    except RuntimeError as error:  # torch's zip writer, about a write that failed
        file.abandon()
        raise OSError(f"{folder / name}: {str(error).splitlines()[0]}") from error


def write_lists(metadata: Metadata, parts: Iterable[Written], folder: Path, common: Mapping[str, int]) -> Written:
    """Write what rank 0 writes once all shards are there: the list of tensors, and what tells readers the format."""
    metadata.storage_data = {index: place for part in parts for index, place in part.places}
    config = dataclasses.asdict(CheckpointingConfig("torch_dist", 1))
    file = HashedFile(folder / COMMON_FILE)
    torch.save(dict(common), file)  # type: ignore[arg-type]
    return Written(
        {
            METADATA_FILE: write_file(folder / METADATA_FILE, metadata_bytes(metadata)),
            CONFIG_FILE: write_file(folder / CONFIG_FILE, json.dumps(config).encode()),
            COMMON_FILE: file.close(),
        },
        [],
    )


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory that training cannot change."""
    return tensor.detach().to("cpu", copy=True)
