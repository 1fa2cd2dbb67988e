"""A plan as plain data, for programs: bytes, seconds and plain numbers. docs/plan_json.md says what each name means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megavlm.build.run_config import RunConfig
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster
from megavlm.plan.cost import Decoding, Efficiency
from megavlm.plan.evaluation import SLACK, Evaluation
from megavlm.plan.guess import Estimate
from megavlm.plan.loading import Loading
from megavlm.plan.planner import StagePlan, Totals
from megavlm.plan.profile import RowProfile, StageProfile
from megavlm.plan.scale import ScalePoint
from megavlm.plan.search import SearchResult
from megavlm.plan.text import MEMORY, assumptions


def as_data(
    name: str, plans: Sequence[StagePlan], cluster: Cluster, efficiency: Efficiency, decoding: Decoding
) -> dict[str, Any]:
    """A run, or all stages of a model."""
    totals = Totals.of(plans, cluster)
    return {
        "plan": name,
        "cluster": cluster.name,
        "gpus": cluster.gpus,
        "memory_of_gpu": cluster.chip.memory_bytes,
        "stages": [_stage(plan, efficiency, decoding) for plan in plans],
        "totals": {
            "stages": len(plans),
            "do_not_work": [plan.name for plan in plans if plan.problem is not None],
            **_hours(totals.hours, totals.floor_hours, cluster.gpus),
        },
    }


def _hours(hours: float, floor: float, gpus: int) -> dict[str, float]:
    return {
        "hours": hours,
        "days": hours / 24,
        "gpu_hours": hours * gpus,
        "floor_hours": floor,
        "floor_days": floor / 24,
        "floor_gpu_hours": floor * gpus,
    }


def _stage(plan: StagePlan, efficiency: Efficiency, decoding: Decoding) -> dict[str, Any]:
    """A stage; one that could not be judged lacks what follows from that."""
    found: dict[str, Any] = {
        "recipe": plan.name,
        "works": plan.problem is None,
        "problem": None if plan.problem is None else str(plan.problem),
        "layout_of": plan.layout_of,
        "search": None if plan.search is None else _search(plan.search, plan.asked),
        "scale": [_point(point, plan.asked) for point in plan.scale],
    }
    one, mix = plan.evaluation, plan.mix
    if one is None or mix is None:
        return found
    return {
        **found,
        "fits": one.fits,
        "layout": {**_layout(one.choice, plan.asked), "options": plan.options},
        "copies": one.choice.data_parallel(one.cluster.gpus),
        "microbatches": one.microbatches,
        "slack": SLACK,
        "pipeline_stages": [_pipeline_stage(profile) for profile in one.profiles],
        "worst_row_of": mix.seen,
        "longest_row_tokens": mix.longest,
        "longest_row_needs_bytes": one.needed_with(mix.longest) if mix.longest else one.needed,
        "rows_per_step": mix.rows,
        "tokens_per_step": mix.tokens,
        "images_per_step": mix.tiles,
        "step_seconds": one.seconds,
        "split_seconds": dict(one.step.split),
        "busiest_stage": one.step.busiest,
        "bounds": {name: bound._asdict() for name, bound in one.step.bounds.items()},
        "communication_seconds": dict(one.step.groups),
        "tokens_per_second": one.tokens_per_second,
        "images_per_second": one.images_per_second,
        "mfu": one.mfu,
        "loader": None if plan.loading is None else _loader(plan.loading),
        "steps": plan.steps,
        **_hours(plan.hours, plan.floor_hours, one.cluster.gpus),
        "notes": list(plan.notes),
        "assumptions": assumptions(plan, efficiency, decoding),
        "assumed_of_data": list(mix.assumptions),
    }


def _loader(loading: Loading) -> dict[str, float]:
    return {
        "pictures_per_second_of_gpu": loading.pictures_per_second,
        "tiles_per_second_of_gpu": loading.tiles_per_second,
        "pictures_per_second_of_node": loading.pictures_per_second_of_node,
        "tiles_per_second_of_node": loading.tiles_per_second_of_node,
        "cores_needed": loading.needed,
        "threads": loading.threads,
        "cores_per_gpu": loading.cores,
        "waits_seconds": loading.waits,
    }


def _layout(choice: Choice, run: RunConfig) -> dict[str, Any]:
    return {
        "name": choice.name,
        "options": choice.options(run),
        "tensor": choice.tensor,
        "pipeline": choice.pipeline,
        "chunks": choice.chunks,
        "sequence_parallel": choice.sequence_parallel,
        "recompute": choice.recompute,
        "towers_everywhere": choice.towers_everywhere,
        "micro_batch": choice.micro_batch,
        "rows_multiple": choice.rows_multiple,
    }


def _pipeline_stage(profile: StageProfile) -> dict[str, Any]:
    return {
        "stage": profile.stage,
        "layers": profile.layers,
        "in_flight": profile.in_flight,
        "parameters": profile.parameters,
        "trainable": profile.trainable,
        "mean": _row(profile.mean),
        "worst": _row(profile.worst),
    }


def _row(row: RowProfile) -> dict[str, Any]:
    memory = {name: getattr(row.memory, name) for name in MEMORY}
    return {
        "tokens": row.tokens,
        "images": row.images,
        "memory": {**memory, "total": row.memory.total},
        "activation_per_microbatch": row.activation_per_microbatch,
    }


def _search(found: SearchResult, run: RunConfig) -> dict[str, Any]:
    return {
        "considered": found.considered,
        "refused": found.refused,
        "traced": found.traced,
        "untried": found.untried,
        "row_tokens": found.row_tokens,
        "best": [
            {"layout": _layout(one.evaluation.choice, run), **_judged(one.evaluation), "reason": one.reason}
            for one in found.best
        ],
        "failures": [{"layout": _layout(one.choice, run), "reason": one.reason} for one in found.failures],
        "estimates": [_estimate(one, run) for one in found.next],
        "estimated_failures": [_estimate(one, run) for one in found.misfits],
    }


def _estimate(one: Estimate, run: RunConfig) -> dict[str, Any]:
    return {"layout": _layout(one.choice, run), "step_seconds": one.seconds, "needed_bytes": one.needed}


def _judged(one: Evaluation) -> dict[str, float]:
    return {
        "step_seconds": one.seconds,
        "tokens_per_second": one.tokens_per_second,
        "mfu": one.mfu,
        "needed_bytes": one.needed,
    }


def _point(point: ScalePoint, run: RunConfig) -> dict[str, Any]:
    """Of GPUs that no layout can use, number and limit alone."""
    one = point.evaluation
    judged = {} if one is None else {"layout": _layout(one.choice, run), **_judged(one)}
    return {"gpus": point.gpus, "limit": point.limit, **judged, "per_gpu": point.efficiency if one else None}
