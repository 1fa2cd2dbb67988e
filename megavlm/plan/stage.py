"""Profiles of all stages of a run: what was traced, put together as the schedule runs it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from megavlm.build.model import with_layout
from megavlm.build.run_config import RunConfig, WeightsConfig
from megavlm.parallel.layout import layers_of_chunks
from megavlm.plan.in_flight import peak_bytes
from megavlm.plan.layers import Chosen, choose_of_kinds
from megavlm.plan.pipeline_program import Shape, in_flight
from megavlm.plan.profile import MemoryUse, OpCost, RowProfile, StageProfile
from megavlm.plan.rows import PlannedRow
from megavlm.plan.trace import (
    ChunkTrace,
    FollowedRow,
    Rank,
    StepTrace,
    follow_microbatch,
    trace_step,
    traced_rank,
    unit_of,
)

CONTEXT = 600 << 20
"""Bytes that CUDA and its libraries take on each GPU before anything is allocated: assumed."""
COMMUNICATOR = 300 << 20
"""Bytes that NCCL takes for each group of ranks: assumed."""

Rows = Mapping[str, PlannedRow]
"""`mean` and `worst`; and `long`, the mean one with more words."""


@dataclass(frozen=True)
class Traces:
    """What was traced before, for runs that are alike in all that a trace depends on."""

    chunks: dict[object, dict[str, FollowedRow]] = field(default_factory=dict)
    steps: dict[object, StepTrace] = field(default_factory=dict)


def profile_run(
    run: RunConfig, world_size: int, microbatches: int, rows: Rows, traces: Traces | None = None
) -> list[StageProfile]:
    """Each pipeline stage of the run in a world of so many ranks, of so many microbatches a data-parallel rank. Traces
    of runs before are taken over where they say the same."""
    # FP8 changes no shape, and this machine need not have it.
    run = with_layout(run).replace(weights=WeightsConfig(), precision=run.precision.replace(fp8_format="none"))
    steps, chunks = _trace_all(run, world_size, rows, Traces() if traces is None else traces)
    return [_profile(run, stage, microbatches, rows, steps[stage], chunks) for stage in range(_stages(run))]


def _stages(run: RunConfig) -> int:
    return run.parallel.pipeline_model_parallel_size


def _trace_all(
    run: RunConfig, world_size: int, rows: Rows, traces: Traces
) -> tuple[list[StepTrace], list[dict[str, ChunkTrace]]]:
    """The step of each stage, and each chunk of the model in order; those that are alike are traced once."""
    flat = run if run.parallel.virtual_pipeline_model_parallel_size == 1 else _as_stages(run)
    flat_world = world_size * run.parallel.virtual_pipeline_model_parallel_size
    chunks: list[dict[str, ChunkTrace]] = []
    for number in range(run.parallel.chunks):
        chosen = _chosen(flat, number)
        key, step = _chunk_key(flat, number, chosen, rows), _step_key(flat, flat_world, [number])
        if key not in traces.chunks:
            with traced_rank(flat, flat_world, number) as rank:
                traces.chunks[key] = _trace_rows(rank, rows, chunks[0] if chunks else {})
                if flat is run and step not in traces.steps:
                    traces.steps[step] = trace_step(rank)
        chunks.append({name: followed.of(chosen) for name, followed in traces.chunks[key].items()})
    steps: list[StepTrace] = []
    for stage in range(_stages(run)):
        step = _step_key(run, world_size, range(stage, run.parallel.chunks, _stages(run)))
        if step not in traces.steps:
            with traced_rank(run, world_size, stage) as rank:
                traces.steps[step] = trace_step(rank)
        steps.append(traces.steps[step])
    return steps, chunks


def _kinds(run: RunConfig, number: int) -> list[Hashable]:
    """Of a chunk's layers: whether a gated block stands before each, which is all they differ in."""
    counts = layers_of_chunks(run.parallel, run.decoder.num_layers)
    first = sum(counts[:number]) + 1
    parts = run.infimm
    return [
        parts is not None and parts.cross_attention.stands_before(layer)
        for layer in range(first, first + counts[number])
    ]


def _chosen(run: RunConfig, number: int) -> Chosen:
    """The layers of a chunk that a trace would run."""
    return choose_of_kinds(_kinds(run, number), unit_of(run))


def _chunk_key(flat: RunConfig, number: int, chosen: Chosen, rows: Rows) -> object:
    """Microbatches do the same in the traced layers of chunks of this key, in however many stages and copies of the
    model."""
    parallel = flat.parallel
    dealt_over = parallel.pipeline_model_parallel_size if _encodes_ahead(flat) else None
    degrees = (parallel.tensor_model_parallel_size, parallel.sequence_parallel, dealt_over)
    ends = number == 0, number == flat.parallel.chunks - 1
    kinds = _kinds(flat, number)
    traced = tuple(kinds[layer] for layer in chosen.layers)
    return _model_key(flat), repr(flat.recompute), degrees, ends, chosen.unit, traced, tuple(rows.items())


def _step_key(run: RunConfig, world_size: int, chunks: Sequence[int]) -> object:
    """Stages of this key update the same weights, over as many ranks."""
    degrees = run.parallel.replace(pipeline_model_parallel_layout=None)
    return _model_key(run), repr(degrees), world_size, _signature(run, chunks)


def _model_key(run: RunConfig) -> object:
    """Of all that a trace depends on beside layout, recompute and rows, which differ from candidate to candidate."""
    others = {"parallel", "recompute", "data", "checkpoint", "log"}
    settings = (one.name for one in fields(run) if one.name not in others)
    return run.data is None, tuple((name, repr(getattr(run, name))) for name in settings)


def _trace_rows(rank: Rank, rows: Rows, first: Mapping[str, ChunkTrace]) -> dict[str, FollowedRow]:
    """Each row through the rank's chunk, equal ones once; `first` is what the model's first chunk did."""
    of_row: dict[PlannedRow, FollowedRow] = {}
    for name, row in rows.items():
        if row not in of_row:
            of_row[row] = follow_microbatch(rank, row, first[name].sent if first else None)
    return {name: of_row[row] for name, row in rows.items()}


def _as_stages(run: RunConfig) -> RunConfig:
    """The run whose stages are the chunks of an interleaved one: megatron-core cuts the layers in the same places."""
    parallel = run.parallel.replace(
        pipeline_model_parallel_size=run.parallel.chunks, virtual_pipeline_model_parallel_size=1
    )
    return run.replace(parallel=parallel)


def _signature(run: RunConfig, chunks: Sequence[int]) -> object:
    """Chunks with the same one hold and do the same."""
    counts = layers_of_chunks(run.parallel, run.decoder.num_layers)
    last = run.parallel.chunks - 1
    every = run.infimm.cross_attention.every_n_layers if run.infimm else 1
    return tuple((chunk == 0, chunk == last, counts[chunk], sum(counts[:chunk]) % every) for chunk in chunks)


def _profile(
    run: RunConfig,
    stage: int,
    microbatches: int,
    rows: Rows,
    step: StepTrace,
    chunks: Sequence[Mapping[str, ChunkTrace]],
) -> StageProfile:
    stages, virtual = _stages(run), run.parallel.virtual_pipeline_model_parallel_size
    counts = layers_of_chunks(run.parallel, run.decoder.num_layers)
    profiles = {
        name: _row_profile(run, name, row, [chunk[name] for chunk in chunks], step, stage, microbatches)
        for name, row in rows.items()
    }
    return StageProfile(
        stage=stage,
        chunks=virtual,
        layers=sum(counts[stage::stages]),
        in_flight=in_flight(Shape(stages, virtual, microbatches), stage),
        parameters=step.parameters,
        trainable=step.trainable,
        mean=profiles["mean"],
        worst=profiles["worst"],
        long=profiles.get("long"),
    )


def _row_profile(
    run: RunConfig,
    name: str,
    row: PlannedRow,
    chunks: Sequence[ChunkTrace],
    step: StepTrace,
    stage: int,
    microbatches: int,
) -> RowProfile:
    stages = _stages(run)
    own = chunks[stage::stages]
    memories = [chunk.memory for chunk in own]
    messages = _messages_held(stage, stages, len(own), microbatches)
    message = chunks[0].message_bytes
    # On the first stage the last output and its gradient; it shows where towers, and no layers, make the peak.
    kept = 2 * message if messages == 0 and stages > 1 else 0
    schedule = peak_bytes(memories, stage, stages, microbatches, kept) + messages * message
    costs = [cost for chunk in own for cost in chunk.costs]
    if _encodes_ahead(run):
        # Dealt over a whole step, each rank's tower sees the same share, whatever it sees of one microbatch.
        share = row.tiles / run.parallel.model_parallel_size / max(chunks[0].own_tiles, 1)
        costs = [cost for cost in costs if cost.part != "tower"]
        costs += [_scaled(cost, share) for cost in chunks[0].costs if cost.part == "tower"]
    return RowProfile(
        name=name,
        tokens=row.tokens,
        length=row.padded,
        documents=len(row.documents) * row.rows,
        images=row.tiles,
        costs=_together([*costs, *step.costs]),
        activation_per_microbatch=sum(memory.held for memory in memories),
        transient=max(max(memory.forward_peak, memory.backward_peak) - memory.held for memory in memories),
        memory=MemoryUse(
            weights=step.static.weights,
            gradients=step.static.gradients,
            optimizer=step.static.optimizer,
            activations=max(schedule, step.peak),
            communication=CONTEXT + COMMUNICATOR * step.communicators,
            batch=microbatches * own[0].batch_bytes + _features_waiting(run, row, stage, microbatches),
        ),
    )


def _encodes_ahead(run: RunConfig) -> bool:
    return run.parallel.vision_over == "all_stages"


def _scaled(cost: OpCost, share: float) -> OpCost:
    return replace(
        cost,
        flops=share * cost.flops,
        bytes=share * cost.bytes,
        made=share * cost.made,
        count=max(round(share * cost.count), 1),
    )


def _features_waiting(run: RunConfig, row: PlannedRow, stage: int, microbatches: int) -> int:
    """A tower that encodes ahead leaves the first stage the features of all microbatches; one was traced."""
    parts = run.infimm or run.aquila_vl
    if not _encodes_ahead(run) or stage > 0 or parts is None:
        return 0
    return (microbatches - 1) * row.tiles * parts.tower.tokens * parts.tower.width * run.precision.dtype.itemsize


def _messages_held(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    """Tensors between stages that live beside the microbatches they belong to, as counted on real ranks.

    Interleaved, they are received and sent while another chunk is computed with, behind the first stage in both
    directions at once; else the gradient that was sent last is held until the next one is there.
    """
    if stages == 1 or microbatches == 1:
        return 0
    if chunks == 1:
        return int(stage > 0)
    return 4 if stage > 0 else 2


def _together(costs: Sequence[OpCost]) -> tuple[OpCost, ...]:
    """Costs of one class added up."""
    found: dict[tuple[str, ...], OpCost] = {}
    for cost in costs:
        key = (cost.part, cost.kind, cost.phase, cost.group, cost.op)
        if key in found:
            before = found[key]
            cost = replace(
                before,
                flops=before.flops + cost.flops,
                bytes=before.bytes + cost.bytes,
                made=before.made + cost.made,
                count=before.count + cost.count,
            )
        found[key] = cost
    return tuple(found.values())
