"""A judged run as text and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megavlm.plan.cluster import GIB, Cluster
from megavlm.plan.cost import Decoding, Efficiency
from megavlm.plan.evaluation import SLACK, Evaluation, needed_bytes
from megavlm.plan.fp8 import fp8_assumptions
from megavlm.plan.loading import loading_assumptions, loading_lines
from megavlm.plan.mix import Mix
from megavlm.plan.planner import StagePlan, Totals
from megavlm.plan.profile import MemoryUse
from megavlm.plan.report import aligned, scale_report, search_report, split_lines, wrapped
from megavlm.plan.stage import COMMUNICATOR, CONTEXT

MEMORY = ("weights", "gradients", "optimizer", "activations", "batch", "communication")


def stage_report(plan: StagePlan, efficiency: Efficiency, decoding: Decoding) -> str:
    """All that is known of a stage: how its layout was found, the plan in it, other numbers of GPUs."""
    parts = [search_report(plan.search, plan.asked)] if plan.search else []
    if plan.layout_of:
        parts.append(f"{plan.name}: the layout of {plan.layout_of}, in which the same parts learn")
    if plan.evaluation and plan.mix:
        parts.append(report(plan, plan.evaluation, plan.mix, efficiency, decoding))
    if plan.scale:
        parts.append(scale_report(plan.scale))
    if plan.refused:
        parts.append(f"{plan.name} has no plan: {plan.refused}")
    return "\n\n".join(parts)


def stages_report(model: str, plans: Sequence[StagePlan], cluster: Cluster) -> str:
    """A line for each stage of a model, and what they come to."""
    table = [("stage", "step s", "MFU", "hours", "days", "GPU-hours", "layout")]
    for plan in plans:
        one, name = plan.evaluation, plan.name.removeprefix(f"{model}/")
        if one is None or plan.problem is not None:
            table.append((name, *("-",) * 5, f"does not work: {one.misfit if one else plan.refused}"))
            continue
        time = (f"{plan.hours:,.1f}", f"{plan.hours / 24:.1f}", f"{plan.hours * cluster.gpus:,.0f}")
        table.append((name, f"{one.seconds:.3g}", f"{one.mfu:.1%}", *time, one.choice.name))
    totals = Totals.of(plans, cluster)
    which = "all stages" if totals.works == len(plans) else f"the {totals.works} of {len(plans)} stages that work"
    options = " ".join(_for_stage(plan, model) for plan in plans if plan.options and plan.problem is None)
    return "\n".join(
        [
            f"{model} on {cluster.name}:",
            *aligned(table),
            f"{spoken_hours(totals.hours)}, {totals.gpu_hours:,.0f} GPU-hours in {which}; at 100 % of the peak "
            f"{spoken_hours(totals.floor_hours)}",
            *dict.fromkeys(note for plan in plans for note in plan.notes),
            *(["options of these layouts:", *wrapped(options, "  ")] if options else []),
        ]
    )


def spoken_hours(hours: float) -> str:
    """In hours and in days."""
    return f"{hours:,.1f} hours ({hours / 24:,.1f} days)"


def _for_stage(plan: StagePlan, model: str) -> str:
    """A stage's options as `megavlm train MODEL` takes them."""
    stage = plan.name.removeprefix(f"{model}/")
    words = plan.options.split(" ")
    return " ".join(f"{stage}:{word}" if word.startswith("--") or "=" in word else word for word in words)


def report(plan: StagePlan, evaluation: Evaluation, mix: Mix, efficiency: Efficiency, decoding: Decoding) -> str:
    """What a judged stage takes and needs."""
    gpus = evaluation.cluster.gpus
    lines = [
        f"{plan.name} on {evaluation.cluster.name}: {evaluation.choice.name}, "
        f"{evaluation.choice.data_parallel(gpus)} copies of the model, {evaluation.microbatches} microbatches each",
        "",
        *_rows(mix),
        "",
        *_memory(evaluation),
        *_longest(evaluation, mix.longest),
        "",
        *_time(plan, evaluation),
        *(["", *loading_lines(plan.loading)] if plan.loading else []),
        "",
        "assumed:",
        *(f"  {line}" for line in assumptions(plan, efficiency, decoding)),
    ]
    return "\n".join(lines)


def _rows(mix: Mix) -> Iterator[str]:
    yield f"a step: {mix.rows:,.0f} rows, {mix.tokens:,.0f} tokens, {mix.tiles:,.0f} images or tiles"
    for name, row in (("mean", mix.mean), ("worst", mix.worst)):
        yield f"  {name} row: {row.length:,} tokens of {len(row.documents)} samples, {row.tiles} images or tiles"
    if mix.seen:
        yield from wrapped(mix.seen, "  ")


def _memory(evaluation: Evaluation) -> Iterator[str]:
    have = evaluation.cluster.chip.memory_bytes / GIB
    columns = ("stage", "layers", "row", *MEMORY, "slack", "in all")
    table: list[tuple[str, ...]] = [columns]
    for profile in evaluation.profiles:
        for row in (profile.mean, profile.worst):
            table.append((str(profile.stage), str(profile.layers), row.name, *_cells(row.memory)))
    yield f"memory of a GPU in GiB, of {have:.1f}:"
    yield from aligned(table)
    yield "it fits" if evaluation.fits else f"it does not fit: {evaluation.misfit}"


def _longest(evaluation: Evaluation, tokens: int) -> Iterator[str]:
    """What the longest rows would need that there could be."""
    if tokens > evaluation.profiles[0].worst.length:
        needed = evaluation.needed_with(tokens) / GIB
        yield f"rows of {tokens:,} tokens, which data.rows.max_tokens allows, would need about {needed:.1f} GiB"


def _cells(memory: MemoryUse) -> list[str]:
    held = [getattr(memory, name) / GIB for name in MEMORY]
    needed = needed_bytes(memory) / GIB
    return [f"{number:.2f}" for number in (*held, needed - memory.total / GIB, needed)]


def _time(plan: StagePlan, evaluation: Evaluation) -> Iterator[str]:
    step = evaluation.step
    stages = len(evaluation.profiles)
    of_stage = f"; of stage {step.busiest} of {stages}, the busiest" if stages > 1 else ""
    yield f"a step takes {step.seconds:.3g} s{of_stage}:"
    yield from split_lines(step)
    yield (
        f"{evaluation.tokens_per_second:,.0f} tokens/s, {evaluation.images_per_second:,.0f} images/s, "
        f"MFU {evaluation.mfu:.1%}"
    )
    yield (
        f"{plan.steps:,} steps: {spoken_hours(plan.hours)}, {plan.hours * evaluation.cluster.gpus:,.0f} GPU-hours; "
        f"at 100 % of the peak {spoken_hours(plan.floor_hours)}"
    )
    yield from plan.notes


def assumptions(plan: StagePlan, efficiency: Efficiency, decoding: Decoding) -> list[str]:
    """What a plan takes for granted, a sentence each."""
    of_data = plan.mix.assumptions if plan.mix else ()
    return [
        *(of_data or ("nothing of the data: rows are those of prepared data",)),
        f"allocator's slack {SLACK:.0%} of what is in use",
        f"{CONTEXT >> 20} MiB for CUDA and its libraries, {COMMUNICATOR >> 20} MiB for each NCCL group",
        "tokens and pixels of all microbatches of a step wait on the GPU",
        *(loading_assumptions(decoding, plan.evaluation.cluster) if plan.loading and plan.evaluation else []),
        f"kernels reach {efficiency.matmul:.0%} (products) and {efficiency.attention:.0%} (attention) of the peak, "
        f"{efficiency.memory:.0%} of the bandwidth; {efficiency.fused:.0%} of elementwise traffic is left by fusion",
        *_starts(efficiency),
        *fp8_assumptions(plan.run, efficiency),
        "MFU is that of training's log: the model's own products as a share of the bf16 peak; nothing of padding and "
        "recompute, no weight gradients of frozen parts, causal attention by half",
    ]


def _starts(efficiency: Efficiency) -> list[str]:
    """What an operation costs the host, where that adds up."""
    if efficiency.hides:
        return []
    return [
        f"each operation takes {efficiency.start_us:.0f} us beside its work, Python included; nothing hides behind it"
    ]
