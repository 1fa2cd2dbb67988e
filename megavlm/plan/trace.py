"""One rank of a run, traced: the trainer's own model, data parallelism, optimizer and schedule, on shapes alone.

What lives from step to step is counted in the whole model as it is built. A microbatch is traced with one layer of each
kind in place of all of them (`layers`).
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megavlm.batch import Media, TextBatch
from megavlm.build.model import Model, build_model
from megavlm.build.run_config import RunConfig
from megavlm.parallel import groups as process_groups
from megavlm.parallel.groups import Groups
from megavlm.parallel.imagined import imagined_world, some_layers, tensors_of_shape
from megavlm.parallel.media_inputs import MediaInputs
from megavlm.parallel.schedule import run_schedule, summed_losses
from megavlm.parallel.wrap import gather_parameters, make_optimizer, wrap_data_parallel
from megavlm.plan.follow import Follower, Label, Tally, storage_bytes
from megavlm.plan.in_flight import ChunkMemory
from megavlm.plan.layers import Chosen, choose
from megavlm.plan.places import BEFORE, BEHIND, Place, Places
from megavlm.plan.profile import GroupName, OpCost
from megavlm.plan.rows import PlannedRow, batch_of
from megavlm.plan.static import StaticBytes, static_bytes
from megavlm.plan.work import group_names


@dataclass(frozen=True)
class ChunkTrace:
    """One microbatch through one chunk."""

    memory: ChunkMemory
    costs: tuple[OpCost, ...]
    batch_bytes: int
    """Of the microbatch itself, as it waits on the device from the beginning of the step."""
    sent: tuple[int, ...] | None
    """Shape of what goes to the next chunk; none behind the last."""
    message_bytes: int
    """Of what goes from chunk to chunk."""
    own_tiles: int
    """What the rank's tower saw."""


@dataclass(frozen=True)
class StepTrace:
    """What is done once a step: gradients reduced, weights updated."""

    costs: tuple[OpCost, ...]
    peak: int
    """Temporaries."""
    static: StaticBytes
    parameters: int
    trainable: int
    communicators: int
    """Groups of more than one rank."""


@dataclass
class Rank:
    """A rank as it was built; within the block that built it."""

    run: RunConfig
    groups: Groups
    model: Model
    wrapped: list[Any]
    optimizer: Any
    places: Places
    names: dict[str, GroupName]

    def follower(self) -> Follower:
        """One that counts from now on."""
        self.places.forget()
        return Follower(self.places, self.names)


def build_rank(run: RunConfig, groups: Groups) -> Rank:
    """The rank's part of the run, with real tensors or, under a FakeTensorMode, without."""
    model = build_model(run, groups)
    wrapped = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer = make_optimizer(wrapped, run.optimizer, run.data_parallel, run.precision.dtype)
    places = Places()
    for chunk in model.chunks:
        places.watch(chunk)
    if model.tower is not None:
        places.watch_tower(model.tower)
    return Rank(run, groups, model, wrapped, optimizer, places, _names(groups))


def _names(groups: Groups) -> dict[str, GroupName]:
    of = groups.collection
    known = {name: getattr(of, name, None) for name in ("tp", "pp", "embd", "pos_embd", "dp", "dp_cp", "mp")}
    return group_names(
        {
            "tp": [known["tp"]],
            "pp": [known["pp"], known["embd"], known["pos_embd"]],
            "dp": [known["dp_cp"], known["dp"]],
            "mp": [known["mp"]],
        }
    )


@contextlib.contextmanager
def traced_rank(run: RunConfig, world_size: int, stage: int) -> Iterator[Rank]:
    """The first rank of a pipeline stage, without data, within the block."""
    rank = stage * (world_size // run.parallel.pipeline_model_parallel_size)
    with imagined_world(rank, world_size):
        groups = process_groups.start(run.parallel, run.train.seed)
        with FakeTensorMode(allow_non_fake_inputs=True):
            built = build_rank(run, groups)
            try:
                yield built
            finally:
                built.places.unwatch()


def trace_step(rank: Rank) -> StepTrace:
    """The optimizer's step, gradients' reduction before it and parameters' gathering behind it included."""
    rank.places.in_step = True
    with rank.follower():
        _update(rank)  # the first one makes the optimizer's state, as no other does
    with (follower := rank.follower()):
        _update(rank)
    rank.places.in_step = False
    static = static_bytes(rank.model.parts(), rank.optimizer)
    everything = [parameter for part in rank.model.parts() for parameter in part.parameters()]
    return StepTrace(
        costs=_summed(follower.tallies, Chosen((), {}, 1)),
        peak=max(follower.peak - follower.live, 0),
        static=static,
        parameters=sum(parameter.numel() for parameter in everything),
        trainable=sum(parameter.numel() for parameter in everything if parameter.requires_grad),
        communicators=_communicators(rank.groups),
    )


def _update(rank: Rank) -> None:
    rank.optimizer.zero_grad()
    for chunk in rank.wrapped:
        chunk.zero_grad_buffer()
        if chunk.ddp_config.overlap_grad_reduce:
            chunk.start_grad_sync()
    rank.wrapped[0].config.finalize_model_grads_func(rank.wrapped, torch.tensor(1, dtype=torch.int32))
    rank.optimizer.step()
    gather_parameters(rank.wrapped)


def _communicators(groups: Groups) -> int:
    """Tensor, pipeline and data parallelism, and the group of all."""
    sizes = groups.collection.tp.size(), groups.pipeline_size, groups.data_size, groups.world_size
    return sum(size > 1 for size in sizes)


class _Counted(NamedTuple):
    """Of the layers that were traced."""

    tallies: dict[Label, Tally]
    peaks: dict[Place, int]
    held: int
    live_at: dict[int, int]
    """Layer -> what lived as it began."""


@dataclass(frozen=True)
class FollowedRow:
    """A row through a chunk as it was followed, in layers that stand for others."""

    chosen: Chosen
    counted: _Counted
    rest: ChunkTrace
    """What does not depend on the number of layers; memory and costs as of this chunk."""

    def of(self, chosen: Chosen) -> ChunkTrace:
        """What a chunk does whose layers are of the same kinds, more or fewer of each."""
        standing = self.chosen.standing_for(chosen)
        return replace(
            self.rest,
            memory=_memory(self.counted, standing),
            costs=_costs(self.counted, standing),
        )


def trace_microbatch(rank: Rank, row: PlannedRow, received: Sequence[int] | None) -> ChunkTrace:
    """A row through the rank's one chunk, forward and backward."""
    return follow_microbatch(rank, row, received).rest


def follow_microbatch(rank: Rank, row: PlannedRow, received: Sequence[int] | None) -> FollowedRow:
    """The same, to be told of other chunks as well."""
    chunk, (wrapped,) = rank.model.chunks[0], rank.wrapped
    chosen = choose(list(chunk.decoder.layers), unit_of(rank.run))
    with rank.follower():
        batch = batch_of(rank.run, row, own_pictures(rank.model))
    follower = rank.follower()
    watched = _Watched(follower, chunk)
    with _without_synchronisation(wrapped), some_layers(chunk.decoder, chosen.layers), watched:
        shape = received or watched.shape
        with tensors_of_shape(shape), follower:
            run_schedule([wrapped], [batch], summed_losses([batch], None), inputs=rank.model.inputs)
    counted = _Counted(dict(follower.tallies), dict(follower.peaks), follower.held, watched.live_at)
    trace = ChunkTrace(
        memory=_memory(counted, chosen),
        costs=_costs(counted, chosen),
        batch_bytes=storage_bytes(tensors_of(batch)),
        sent=None if chunk.post_process else tuple(watched.shape),
        message_bytes=math.prod(shape) * rank.run.precision.dtype.itemsize,
        own_tiles=_own_tiles(batch.media),
    )
    return FollowedRow(chosen, counted, trace)


def _costs(counted: _Counted, chosen: Chosen) -> tuple[OpCost, ...]:
    return tuple(cost for cost in _summed(counted.tallies, chosen) if cost.group != "dp")


def _own_tiles(media: Media | None) -> int:
    if media is None:
        return 0
    held = range(len(media.tiles)) if media.held is None else media.held
    return sum(media.tiles[picture] for picture in held)


def own_pictures(model: Model) -> Any:
    """Which pictures the rank encodes, as `rows.batch_of` asks."""
    if isinstance(model.inputs, MediaInputs):
        return model.inputs.own_pictures
    return lambda tiles: [() for _ in tiles]


def tensors_of(batch: TextBatch) -> list[Tensor]:
    """All tensors of a microbatch that wait on the device."""
    found: list[Tensor | None] = [batch.tokens, batch.labels, batch.loss_weights]
    media = batch.media
    if media is not None:
        table = getattr(media, "table", None)
        found += [media.patches, getattr(media, "image_of_token", None), getattr(media, "has_image", None)]
        found += [getattr(table, "index", None), getattr(table, "weight", None)]
    return [tensor for tensor in found if tensor is not None]


def unit_of(run: RunConfig) -> int | None:
    """How many layers are recomputed at once; None: some layers are and others are not."""
    if run.recompute.granularity != "full":
        return 1
    return run.recompute.num_layers if run.recompute.method == "uniform" else None


@contextlib.contextmanager
def _without_synchronisation(wrapped: Any) -> Iterator[None]:
    """Gradients stay where they are: what is done once a step is traced apart."""
    config = wrapped.config
    saved = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func, config.no_sync_func = None, contextlib.nullcontext
    try:
        with wrapped.no_sync():
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = saved


class _Watched:
    """Notes what lives as each layer begins, what is left of the forward pass, and the shape that is sent."""

    def __init__(self, follower: Follower, chunk: nn.Module) -> None:
        self.follower, self.chunk = follower, chunk
        self.live_at: dict[int, int] = {}
        self.shape: list[int] = [0, 0, 0]
        """Filled once the forward pass has ended, which is before anything is received of the next stage."""
        self._hook: Any = None

    def __enter__(self) -> _Watched:
        self.follower.places.entering = self._entering
        self._hook = self.chunk.register_forward_hook(self._left)
        return self

    def __exit__(self, *_: Any) -> None:
        self.follower.places.entering = lambda layer: None
        self._hook.remove()

    def _entering(self, layer: int) -> None:
        self.live_at[layer] = self.follower.live

    def _left(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.shape[:] = output.shape if output.dim() == 3 else [0, 0, 0]
        self.follower.wait_for_backward()


def _memory(counted: _Counted, chosen: Chosen) -> ChunkMemory:
    starts = chosen.starts
    # A chunk that holds the tower alone has no layers.
    held = {start: counted.live_at[behind] - counted.live_at[start] for start, behind in pairwise([*starts, BEHIND])}
    extra = sum((chosen.times_of(start) - 1) * held[start] for start in starts)
    first = (BEFORE, starts[0] if starts else BEFORE)
    peaks: dict[bool, int] = defaultdict(int)
    for place, peak in counted.peaks.items():
        # The layers that are not traced are thought to stand right behind the first.
        above = 0 if chosen.unit_of(place.layer) in first else extra
        peaks[place.phase == "forward"] = max(peaks[place.phase == "forward"], peak + above)
    return ChunkMemory(counted.held + extra, peaks[True], peaks[False])


def _summed(tallies: dict[Label, Tally], chosen: Chosen) -> tuple[OpCost, ...]:
    """By class of work, each layer as often as it stands for others."""
    sums: dict[tuple[Any, ...], Tally] = defaultdict(Tally)
    for (place, kind, group, op), tally in tallies.items():
        total, times = sums[place.part, kind, place.phase, group, op], chosen.times_of(place.layer)
        total.flops += times * tally.flops
        total.bytes += times * tally.bytes
        total.made += times * tally.made
        total.count += times * tally.count
    return tuple(
        OpCost(
            part=part,
            kind=kind,
            phase=phase,
            group=group,
            op=op,
            flops=t.flops,
            bytes=t.bytes,
            made=t.made,
            count=t.count,
        )
        for (part, kind, phase, group, op), t in sums.items()
    )
