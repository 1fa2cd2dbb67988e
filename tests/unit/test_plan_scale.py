"""From 8 to 4,096 GPUs: times that follow the work, and what limits them named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from plan_profiles import MadeModel, evaluated, rate

from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster, parse_cluster
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.scale import counts, limits_named, scale
from megavlm.plan.step import drawn_rows
from megavlm.recipes import recipe

RUN = recipe("infimm-llama2-13b/pretrain")
CLUSTER = parse_cluster("2x8xH100")
SMALL = MadeModel(layers=40, layer_bytes=1 << 20, activation=1 << 20)


def test_gpus_are_doubled_in_whole_machines() -> None:
    assert counts(CLUSTER) == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert counts(parse_cluster("5x8xA100-80GB"))[:4] == [8, 16, 32, 40]
    assert counts(parse_cluster("3x6xH100"))[:3] == [12, 18, 24]


def test_computing_alone_halves_with_twice_the_gpus() -> None:
    known = evaluated(SMALL, Choice(), CLUSTER, rows=4096)
    points = scale(RUN, [known], rate)
    assert [point.gpus for point in points] == counts(CLUSTER)
    for point in points:
        assert point.evaluation is not None and point.limit == "computing"
        assert point.evaluation.seconds == pytest.approx(known.seconds * 16 / point.gpus)
        assert point.evaluation.mfu == pytest.approx(known.mfu) and point.efficiency == pytest.approx(1)
        assert point.evaluation.microbatches == 4096 // point.gpus


def test_what_was_traced_at_a_size_is_what_comes_back_there() -> None:
    model = dataclasses.replace(SMALL, gradients=1e9, tensor_message=1e7, message=1e7)
    known = evaluated(model, Choice(tensor=2, pipeline=2, sequence_parallel=True), CLUSTER, rows=640)
    (point,) = scale(RUN, [known], rate, gpus=[16])
    assert point.evaluation is not None and point.evaluation.seconds == pytest.approx(known.seconds)


def test_limits_are_named() -> None:
    model = dataclasses.replace(SMALL, gradients=2e10)
    points = scale(RUN, [evaluated(model, Choice(), CLUSTER, rows=4096)], rate)
    assert points[0].limit == "computing" and points[-1].limit.startswith("data-parallel messages")
    assert [point.efficiency for point in points] == sorted((point.efficiency for point in points), reverse=True)
    assert limits_named(points)[0].endswith(points[-1].limit) or "data-parallel" in limits_named(points)[0]
    bubble = scale(RUN, [evaluated(SMALL, Choice(pipeline=4), CLUSTER, rows=1024)], rate)
    assert bubble[-1].limit.startswith("the pipeline's bubble")
    uneven = dataclasses.replace(SMALL, tower_flops=4e13, images=(1, 9))
    drawn = scale(
        RUN,
        [evaluated(uneven, Choice(), CLUSTER, rows=1024)],
        rate,
        drawn=lambda microbatches, replicas: drawn_rows([*8 * [(1000, 0)], (1000, 9)], microbatches, replicas),
    )
    assert drawn[5].limit.startswith("replicas with longer rows or more images")


def test_more_copies_than_rows_are_shown_with_what_limits_them() -> None:
    points = scale(RUN, [evaluated(SMALL, Choice(), CLUSTER, rows=64)], rate)
    assert [point.gpus for point in points] == counts(CLUSTER)
    assert points[3].evaluation is not None and all(point.evaluation is None for point in points[4:])
    assert points[4].limit == "the recipe's batch (64 rows for 128 copies of the model)"
    assert limits_named(points)[-1] == f"from 128 GPUs on: {points[4].limit}"


def test_where_there_are_more_copies_than_rows_the_model_is_cut_further() -> None:
    asked: list[tuple[int, int]] = []

    def further(cluster: Cluster, rows: int) -> Evaluation | None:
        asked.append((cluster.gpus, rows))
        if cluster.gpus > 512:
            return None
        return evaluated(SMALL, Choice(tensor=cluster.gpus // rows, sequence_parallel=True), cluster, rows)

    points = scale(RUN, [evaluated(SMALL, Choice(), CLUSTER, rows=64)], rate, further=further)
    assert asked == [(gpus, 64) for gpus in (128, 256, 512, 1024, 2048, 4096)]
    used = {point.gpus: point.evaluation.choice.tensor for point in points if point.evaluation}
    assert used == {8: 1, 16: 1, 32: 1, 64: 1, 128: 2, 256: 4, 512: 8}
    assert points[-1].limit == "the recipe's batch (64 rows for 512 copies of the model)"


def test_what_was_not_looked_at_is_not_called_the_batch() -> None:
    known = evaluated(SMALL, Choice(), CLUSTER, rows=16)
    points = scale(RUN, [known], rate, gpus=[16, 32], further=lambda cluster, rows: "not looked at")
    assert points[0].evaluation is not None
    assert (points[1].evaluation, points[1].limit) == (None, "not looked at")


def test_rows_that_wait_take_less_where_there_are_fewer() -> None:
    known = evaluated(SMALL, Choice(), CLUSTER, rows=128)
    waiting = [dataclasses.replace(known.profiles[0].mean.memory, batch=800)] * 2
    mean, worst = (
        dataclasses.replace(row, memory=memory)
        for row, memory in zip((known.profiles[0].mean, known.profiles[0].worst), waiting, strict=True)
    )
    known = dataclasses.replace(known, profiles=(dataclasses.replace(known.profiles[0], mean=mean, worst=worst),))
    points = scale(RUN, [known], rate, gpus=[8, 16, 64])
    held = [point.evaluation.memory[0].batch for point in points if point.evaluation]
    assert held == [1600, 800, 200]


def test_the_fastest_of_several_layouts_is_taken_at_each_size() -> None:
    model = dataclasses.replace(SMALL, gradients=2e9, tensor_message=5e7)
    alone, split = (
        evaluated(model, choice, CLUSTER, rows=512) for choice in (Choice(), Choice(tensor=4, sequence_parallel=True))
    )
    gpus = counts(CLUSTER)[:-1]
    both = scale(RUN, [alone, split], rate, gpus=gpus)
    singles = [point for one in (alone, split) for point in scale(RUN, [one], rate, gpus=gpus)]
    for point in both:
        seconds = [one.evaluation.seconds for one in singles if one.evaluation and one.gpus == point.gpus]
        assert point.evaluation is not None and point.evaluation.seconds == min(seconds)
    used = {point.evaluation.choice.tensor for point in both if point.evaluation}
    assert used == {1, 4}


def test_a_layout_that_only_fits_with_more_shards_is_left_out_where_it_does_not() -> None:
    heavy = dataclasses.replace(SMALL, layer_bytes=9 << 26)
    known = evaluated(heavy, Choice(), CLUSTER, rows=512)
    points = scale(RUN, [known], rate, gpus=[8, 512])
    assert points[0].evaluation is None and "more than there are" in points[0].limit
    assert points[1].evaluation is not None and points[1].evaluation.needed < known.needed


def test_uneven_rows_cost_what_their_tokens_cost() -> None:
    known = evaluated(SMALL, Choice(), CLUSTER, rows=96)
    (point,) = scale(RUN, [known], rate, gpus=[64])
    # 96 rows on 64 GPUs: two each, three quarters full.
    assert point.evaluation is not None and point.evaluation.microbatches == 2
    assert point.evaluation.seconds == pytest.approx(known.seconds / 4)
    assert np.isclose(point.evaluation.mfu, known.mfu)
