"""The optimizer's state of each parameter: the same names and shapes from every kind of optimizer.

megatron-core's optimizers keep moments and float32 masters of whole parameters, or (the distributed one) of slices
that the data-parallel ranks share out. Here they are read and written parameter by parameter, so a checkpoint knows
nothing of slices, of parameter groups, or of ranks that train nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"


@dataclass(frozen=True)
class Slot:
    """What this rank's optimizer keeps of the elements [start, stop) of a parameter."""

    parameter: nn.Parameter
    start: int
    stop: int
    tensors: Mapping[str, Tensor]
    """The optimizer's own tensors, by the names of `state_names`."""

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == self.parameter.numel()


def state_names(parameter: nn.Parameter) -> tuple[str, ...]:
    """What an optimizer keeps of a parameter; a float32 one is its own master."""
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)


def slots(optimizer: MegatronOptimizer) -> dict[nn.Parameter, Slot]:
    """All that is kept on this rank; what has not been stepped yet is filled with zeros first."""
    found = {}
    for inner in _stepping(optimizer):
        _fill(inner)
        for parameter, held, start, stop in _held(inner):
            kept = inner.optimizer.state[held]
            tensors = {name: kept[name] for name in MOMENTS}
            if parameter.dtype != torch.float32:
                tensors[MASTER] = held
            found[parameter] = Slot(parameter, start, stop, tensors)
    return found


def steps_taken(optimizer: MegatronOptimizer) -> int:
    """How often Adam has moved the weights, by which it corrects its bias; 0 on a rank that trains nothing."""
    taken = [0]
    for inner in _stepping(optimizer):
        taken += [int(kept["step"]) for kept in inner.optimizer.state.values() if "step" in kept]
        taken += [int(group["step"]) for group in inner.optimizer.param_groups if "step" in group]
    return max(taken)


def set_steps_taken(optimizer: MegatronOptimizer, steps: int) -> None:
    """The counterpart; the state must have been filled."""
    for inner in _stepping(optimizer):
        for group in inner.optimizer.param_groups:
            if _counts_by_group(inner):
                group["step"] = steps
                continue
            for held in group["params"]:
                inner.optimizer.state[held]["step"].fill_(steps)


@dataclass(frozen=True)
class Whole:
    """One of the tensors that the optimizer keeps of a parameter, in the parameter's shape."""

    parameter: nn.Parameter
    name: str
    tensor: Tensor
    is_copy: bool
    """Whether it lies in host memory apart from the optimizer's own."""


def gather_states(
    optimizer: MegatronOptimizer, owners: Mapping[nn.Parameter, int], group: dist.ProcessGroup
) -> Iterator[Whole]:
    """The whole state of each parameter that this rank of the data-parallel group owns.

    `owners` gives every parameter its rank, in the same order on all of them. What is not distributed comes as the
    optimizer's own tensors, the rest as copies: each rank then holds those of its share, none holds all.
    """
    mine = slots(optimizer)
    distributed = [inner for inner in _stepping(optimizer) if _is_dealt(inner)]
    for name in (*MOMENTS, MASTER):
        wanted = [parameter for parameter in owners if name in state_names(parameter)]
        for inner in distributed:
            yield from _exchange(name, wanted, owners, mine, _shares(inner), inner.data_parallel_group)
        if not distributed:
            owned = [parameter for parameter in wanted if owners[parameter] == group.rank()]
            yield from (Whole(p, name, mine[p].tensors[name].detach().view(p.shape), is_copy=False) for p in owned)


def _stepping(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers inside, those without a parameter left out."""
    inner = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [one for one in inner if not one.is_stub_optimizer]


def _is_dealt(inner: Any) -> bool:
    return isinstance(inner, DistributedOptimizer) and inner.data_parallel_group.size() > 1


def _counts_by_group(inner: Any) -> bool:
    """Whether its Adam counts steps in the parameter group (apex's, Transformer Engine's), or for each tensor."""
    return "bias_correction" in inner.optimizer.defaults


def _fill(inner: Any) -> None:
    inner.init_state_fn(inner.optimizer)
    if _counts_by_group(inner):
        return
    for group in inner.optimizer.param_groups:
        for held in group["params"]:
            kept = inner.optimizer.state[held]
            if "step" not in kept:
                on_device = group.get("fused") or group.get("capturable")
                kept["step"] = torch.zeros((), dtype=torch.float32, device=held.device if on_device else "cpu")


def _held(inner: Any) -> Iterator[tuple[nn.Parameter, Tensor, int, int]]:
    """(parameter, what the optimizer moves in its place, and which of its elements these are)."""
    if isinstance(inner, DistributedOptimizer):
        for parameter, (group, place) in inner.model_param_group_index_map.items():
            share = inner._get_model_param_range_map(parameter)["param"]
            yield parameter, inner.optimizer.param_groups[group]["params"][place], share.start, share.end
        return
    if isinstance(inner, Float16OptimizerWithFloat16Params):
        pairs = zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True)
        both = [pair for models, masters in pairs for pair in zip(models, masters, strict=True)]
        both += [(parameter, parameter) for group in inner.fp32_from_fp32_groups for parameter in group]
    else:
        both = [(parameter, parameter) for parameter in inner.get_parameters()]
    yield from ((parameter, held, 0, parameter.numel()) for parameter, held in both)


def _shares(inner: DistributedOptimizer) -> dict[nn.Parameter, list[tuple[int, int]]]:
    """Of each parameter which elements each data-parallel rank keeps: every bucket is cut evenly."""
    ranks = inner.data_parallel_group.size()
    shares = {}
    for buffer in inner.buffers:
        for parameter, (first, last, bucket_index) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_index]
            share = bucket.grad_data.numel() // ranks
            bounds = [min(max(bucket.offset + rank * share, first), last) - first for rank in range(ranks + 1)]
            shares[parameter] = list(itertools.pairwise(bounds))
    return shares


def _exchange(
    name: str,
    wanted: Sequence[nn.Parameter],
    owners: Mapping[nn.Parameter, int],
    mine: Mapping[nn.Parameter, Slot],
    shares: Mapping[nn.Parameter, list[tuple[int, int]]],
    group: dist.ProcessGroup,
) -> Iterator[Whole]:
    """Every rank sends its slices to the owners, all in one message."""
    wanted = [parameter for parameter in wanted if parameter in shares]
    if not wanted:
        return
    rank, ranks = group.rank(), group.size()
    for_rank = [[p for p in wanted if owners[p] == other] for other in range(ranks)]
    lengths = {p: [stop - start for start, stop in shares[p]] for p in wanted}
    for slot in mine.values():
        assert slot.parameter not in shares or shares[slot.parameter][rank] == (slot.start, slot.stop), slot
    pieces = [mine[p].tensors[name].detach().flatten() for owned in for_rank for p in owned if lengths[p][rank]]
    sent = [sum(lengths[p][rank] for p in owned) for owned in for_rank]
    received = [sum(lengths[p][other] for p in for_rank[rank]) for other in range(ranks)]
    device = wanted[0].device
    arrived = torch.empty(sum(received), dtype=torch.float32, device=device)
    empty = torch.empty(0, dtype=torch.float32, device=device)
    dist.all_to_all_single(arrived, torch.cat([empty, *pieces]), received, sent, group=group)
    whole = {p: torch.empty(p.shape, dtype=torch.float32) for p in for_rank[rank]}
    parts = iter(arrived.split([lengths[p][other] for other in range(ranks) for p in for_rank[rank]]))
    for other in range(ranks):
        for p in for_rank[rank]:
            start, stop = shares[p][other]
            whole[p].view(-1)[start:stop].copy_(next(parts))
    yield from (Whole(p, name, tensor, is_copy=True) for p, tensor in whole.items())
