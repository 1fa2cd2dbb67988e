"""What a step's data come to, from its plan alone: the same on every rank, and nothing is exchanged."""

from __future__ import annotations

import numpy as np

from megavlm.data.step_plan import StepPlan
from megavlm.train.report import StepWork


def work_of_plan(plan: StepPlan) -> StepWork:
    """Of prepared data; target tokens are known once they are read."""
    return StepWork(
        samples=len(plan.tokens),
        rows=plan.packing.rows,
        tokens=int(plan.tokens.sum()),
        row_tokens=int(plan.packing.row_lengths.sum()),
        target_tokens=0,
        images=_pictures(plan),
        tiles=int(plan.tiles.sum()),
        seeing_tokens=int(plan.tokens[plan.tiles > 0].sum()),
        squared_lengths=int((plan.tokens**2).sum()),
    )


def work_of_rows(rows: int, length: int) -> StepWork:
    """Of rows of text, each one document."""
    return StepWork(
        samples=rows,
        rows=rows,
        tokens=rows * length,
        row_tokens=rows * length,
        target_tokens=rows * (length - 1),
        images=0,
        tiles=0,
        seeing_tokens=0,
        squared_lengths=rows * length**2,
    )


def _pictures(plan: StepPlan) -> int:
    """Of all samples that are not dropped."""
    total = 0
    for places, pictures in plan.pictures.values():
        ends = np.concatenate([[0], pictures.is_first.cumsum()])[pictures.offsets]
        total += int(np.diff(ends)[~plan.is_dropped[places]].sum())
    return total
