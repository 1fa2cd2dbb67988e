"""One checkpoint of a run: trainable weights, optimizer, schedule, generators and the scales of FP8.

All ranks write and read it. Every tensor is saved in the shape that the whole model gives it, so that any layout can
read what any other wrote; the data-parallel ranks, who hold the same, share the writing out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megavlm.checkpoint.fp8_scales import read_scales, restore_scales, scales_key, scales_to_save
from megavlm.checkpoint.generators import generator_states, set_generator_states
from megavlm.checkpoint.optimizer_state import gather_states, set_steps_taken, slots, steps_taken
from megavlm.checkpoint.restricted_pickle import check_common, read_metadata
from megavlm.checkpoint.shard_files import Plan, host_copy, plan_files
from megavlm.checkpoint.state import TrainState
from megavlm.errors import CheckpointError
from megavlm.parallel.agree import agreed
from megavlm.parallel.groups import seed_generators
from megavlm.parallel.vision_parallel import deal_images
from megavlm.parallel.wrap import gather_parameters

_STEPS_APART = 1_000_003
"""Between the seeds of two steps, so that those of ranks (10,000 apart) and of steps do not meet."""


@dataclass(frozen=True)
class Counters:
    """What a checkpoint knows beside tensors."""

    optimizer_steps: int
    """Steps that moved the weights."""
    scheduler_steps: int
    """Steps that the learning rate has seen."""


def plan_checkpoint(state: TrainState, *, snapshot: bool) -> Plan:
    """What each rank will write; with `snapshot` it is copied, so that training may go on while it is written."""
    gather_parameters(list(state.chunks))
    return plan_files([*_tensors_to_save(state, snapshot), *_generators_to_save(state), *_scales_to_save(state)])


def counters(state: TrainState) -> Counters:
    """On all ranks alike."""
    taken = torch.tensor(steps_taken(state.optimizer), device=state.groups.device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return Counters(int(taken), state.scheduler.num_steps)


def load_checkpoint(state: TrainState, folder: Path, step: int, found: Counters, layout: Mapping[str, Any]) -> None:
    """Fill the state from a verified folder; nothing is touched before all ranks know that all tensors fit."""
    gather_parameters(list(state.chunks))  # one in flight would write over what is read
    same_place = dict(layout) == state.layout
    wanted = _Wanted(state, same_place)
    with agreed():
        check_common(folder)
        _check_tensors(wanted.tensors.values(), read_metadata(folder), folder)
        scales = read_scales(state, folder, same_place)
    with agreed():  # torch tells all ranks of one that cannot read
        wanted.read(folder)
    restore_scales(state, scales)
    set_steps_taken(state.optimizer, found.optimizer_steps)
    state.scheduler.num_steps = found.scheduler_steps
    state.scheduler.step(increment=0)
    if not same_place:
        seed_generators(state.seed + step * _STEPS_APART)


def trained_tensors(chunks: Iterable[DistributedDataParallel], groups: Any) -> list[ShardedBase]:
    """megatron-core's description of each trainable parameter: its place in the whole, and its copies."""
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.collection.dp_cp}
    found = [
        described
        for chunk in chunks
        for described in chunk.module.sharded_state_dict(metadata=metadata).values()
        if isinstance(described.data, nn.Parameter) and described.data.requires_grad
    ]
    held = {id(described.data) for described in found}
    missing = [n for c in chunks for n, p in c.named_parameters() if p.requires_grad and id(p) not in held]
    assert not missing, f"trained, and in no sharded_state_dict: {missing}"
    return found


def _tensors_to_save(state: TrainState, snapshot: bool) -> Iterator[ShardedBase]:
    group = state.groups.collection.dp_cp
    # Of copies on several tensor-parallel ranks or pipeline stages the first is written.
    first = [t for t in trained_tensors(state.chunks, state.groups) if not any(t.replica_id[:-1])]
    deal = deal_images([float(described.data.numel()) for described in first], group.size())
    owner = {number: rank for rank, numbers in enumerate(deal) for number in numbers}
    owners = {described.data: owner[number] for number, described in enumerate(first)}
    by_parameter = {described.data: described for described in first}
    for described in first:
        if owners[described.data] == group.rank():
            yield _with_data(described, described.key, _taken(described.data.detach(), snapshot))
    for kept in gather_states(state.optimizer, owners, group):
        described = by_parameter[kept.parameter]
        tensor = _taken(kept.tensor, snapshot and not kept.is_copy)
        yield _with_data(described, _state_key(kept.name, described.key), tensor)


def _taken(tensor: Tensor, snapshot: bool) -> Tensor:
    return host_copy(tensor) if snapshot else tensor


def _generators_to_save(state: TrainState) -> Iterator[ShardedTensor]:
    rank, ranks = state.groups.rank, state.groups.world_size
    for name, tensor in generator_states(state.groups.device).items():
        yield ShardedTensor.from_rank_offsets(f"generators.{name}", tensor[None].clone(), (0, rank, ranks))


def _scales_to_save(state: TrainState) -> Iterator[ShardedTensor]:
    scales = scales_to_save(state)
    if scales is not None:
        yield ShardedTensor.from_rank_offsets(scales_key(state.groups.rank), scales)


def _state_key(name: str, key: str) -> str:
    return f"optimizer.{name}.{key}"


def _with_data(described: ShardedBase, key: str, data: Tensor) -> ShardedBase:
    """The same place in the whole for another tensor of the same shape, written by this rank alone."""
    if isinstance(described, ShardedTensorFactory):
        return dataclasses.replace(described, key=key, data=data, replica_id=0)
    return dataclasses.replace(described, key=key, data=data, dtype=data.dtype, replica_id=0)


class _Wanted:
    """The tensors that a rank reads, and where they go."""

    def __init__(self, state: TrainState, same_place: bool) -> None:
        self.state = state
        self.tensors: dict[str, ShardedBase] = {}
        self._targets: dict[str, tuple[Tensor, slice]] = {}
        kept = slots(state.optimizer)
        for number, described in enumerate(trained_tensors(state.chunks, state.groups)):
            parameter = described.data
            self._want(f"{number}", _with_data(described, described.key, parameter.detach()), parameter.detach())
            if parameter not in kept:
                continue  # another data-parallel rank keeps all of it
            slot = kept[parameter]
            for name, held in slot.tensors.items():
                whole = held.detach() if held.shape == parameter.shape else torch.zeros(parameter.shape)
                with_data = _with_data(described, _state_key(name, described.key), whole)
                self._want(f"{number}.{name}", with_data, held.detach(), slice(slot.start, slot.stop))
        self._generators = generator_states(state.groups.device) if same_place else {}
        for described, name in zip(_generators_to_save(state), self._generators, strict=False):
            self.tensors[f"generators.{name}"] = described

    def _want(self, name: str, described: ShardedBase, target: Tensor, part: slice = slice(None)) -> None:
        self.tensors[name] = described
        self._targets[name] = (target, part)

    def read(self, folder: Path) -> None:
        """Copy what the files hold to where it belongs."""
        try:
            loaded = dist_checkpointing.load(dict(self.tensors), str(folder), validate_access_integrity=False)
        except (CheckpointException, CheckpointingException) as error:
            problem = f"cannot be read: {_first_line(error)}"
            raise CheckpointError("the checkpoint", str(folder), problem, "take another checkpoint") from error
        for name, (target, part) in self._targets.items():
            source = loaded[name]
            target.copy_(source if source.shape == target.shape else source.flatten()[part].view_as(target))
        if self._generators:
            states = {name: loaded[f"generators.{name}"][0] for name in self._generators}
            set_generator_states(states, self.state.groups.device)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_tensors(wanted: Iterable[ShardedBase], metadata: Metadata, folder: Path) -> None:
    """Refuse a checkpoint that lacks a tensor, or holds it in another shape or format."""
    described: dict[str, Any] = {str(number): tensor for number, tensor in enumerate(wanted)}
    apply_factories(described)
    flat = (one for value in described.values() for one in (value if isinstance(value, list) else [value]))
    for tensor in flat:
        found = metadata.state_dict_metadata.get(tensor.key)
        where = f"{folder}: {tensor.key}"
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(where, None, "is missing", "take a checkpoint of this model and these trained parts")
        shape, expected = tuple(found.size), tuple(tensor.global_shape)
        if tensor.allow_shape_mismatch:  # the vocabulary's padding depends on the layout
            shape, expected = shape[1:], expected[1:]
        if shape != expected:
            raise CheckpointError(where, shape, f"this run needs the shape {expected}", "take its own checkpoint")
        if found.properties.dtype != tensor.dtype:
            problem = f"this run holds it in {tensor.dtype}"
            raise CheckpointError(where, str(found.properties.dtype), problem, "set --params-dtype as it was")
