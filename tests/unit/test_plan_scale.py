"""From 8 to 4,096 GPUs: times that follow the work, and what limits them named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from plan_profiles import MadeModel, evaluated, rate

from megavlm.build.run_config import check_for_world
from megavlm.options import parse_options
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster, parse_cluster
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.further import Promising
from megavlm.plan.guess import Guesser
from megavlm.plan.scale import Timed, counts, limits_named, rows_suffice, scale
from megavlm.plan.search import with_rows
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
        drawn=lambda traced, microbatches, replicas: drawn_rows([*8 * [(1000, 0)], (1000, 9)], microbatches, replicas),
    )
    assert drawn[5].limit.startswith("replicas with longer rows or more images")


def test_more_copies_than_rows_are_shown_with_what_limits_them() -> None:
    points = scale(RUN, [evaluated(SMALL, Choice(), CLUSTER, rows=64)], rate)
    assert [point.gpus for point in points] == counts(CLUSTER)
    assert points[3].evaluation is not None and all(point.evaluation is None for point in points[4:])
    assert points[4].limit == "the recipe's batch (64 rows for 128 copies of the model)"
    assert limits_named(points)[-1] == f"from 128 GPUs on: {points[4].limit}"


class Cutting:
    """Cuts the model further where there are more copies than rows, up to so many GPUs."""

    def __init__(self, most: int = 4096, late: str | None = None) -> None:
        self.most, self.late = most, late
        self.asked: list[int] = []

    def more(self, timed: Timed) -> Evaluation | None:
        for gpus, known in timed.items():
            if not known and gpus <= self.most:
                self.asked.append(gpus)
                choice = Choice(tensor=gpus // 64, sequence_parallel=True)
                return evaluated(
                    dataclasses.replace(SMALL, tensor_message=1e7), choice, CLUSTER.with_gpus(gpus), rows=64
                )
        return None

    def unseen(self) -> str | None:
        return self.late


def test_stages_that_take_turns_may_have_emptier_rows_while_there_are_samples() -> None:
    interleaved = Choice(tensor=8, pipeline=16, chunks=2, sequence_parallel=True)
    finetune = recipe("infimm-llama2-13b/finetune")
    assert finetune.samples_per_step == 64
    for gpus, rows, suffice in ((256, 40, True), (512, 40, True), (1024, 40, False), (512, 20, False)):
        assert rows_suffice(finetune, interleaved, CLUSTER.with_gpus(gpus), rows) == suffice
    alone = Choice(tensor=8, sequence_parallel=True)
    assert not rows_suffice(finetune, alone, CLUSTER.with_gpus(512), 40), "each copy of the model needs a row"


def test_where_there_are_more_copies_than_rows_the_model_is_cut_further() -> None:
    cutting = Cutting(most=512)
    points = scale(RUN, [evaluated(SMALL, Choice(), CLUSTER, rows=64)], rate, further=cutting)
    assert cutting.asked == [128, 256, 512]
    used = {point.gpus: point.evaluation.choice.tensor for point in points if point.evaluation}
    assert used == {8: 1, 16: 1, 32: 1, 64: 1, 128: 2, 256: 4, 512: 8}
    assert points[-1].limit == "the recipe's batch (64 rows for 512 copies of the model)"


def test_what_is_found_for_many_gpus_is_timed_on_few_as_well() -> None:
    alone = evaluated(dataclasses.replace(SMALL, gradients=2e10), Choice(), CLUSTER, rows=64)
    split = evaluated(SMALL, Choice(tensor=8, sequence_parallel=True), CLUSTER, rows=64)

    class Late(Cutting):
        def more(self, timed: Timed) -> Evaluation | None:
            return None if any(len(known) > 1 for known in timed.values()) else split

    (point,) = scale(RUN, [alone], rate, gpus=[16], further=Late())
    assert point.evaluation is not None and point.evaluation.choice.tensor == 8
    assert point.evaluation.seconds < alone.seconds


def test_what_was_not_looked_at_is_not_called_the_batch() -> None:
    known = evaluated(SMALL, Choice(), CLUSTER, rows=16)
    points = scale(RUN, [known], rate, gpus=[16, 32], further=Cutting(most=8, late="not looked at"))
    assert points[0].evaluation is not None
    assert (points[1].evaluation, points[1].limit) == (None, "not looked at")


def promising(rows: int, judged: list[tuple[int, Choice]], is_late: bool = False) -> Promising:
    def evaluate(choice: Choice, cluster: Cluster) -> Evaluation:
        judged.append((cluster.gpus, choice))
        even = MadeModel(layers=choice.pipeline * choice.chunks, layer_bytes=1 << 20, activation=1 << 20)
        return evaluated(even, choice, cluster, rows=rows)

    clusters = [CLUSTER.with_gpus(count) for count in (8, 16, 4096)]
    return Promising(RUN, clusters, Guesser(RUN), evaluate, rows, lambda: is_late, "not looked at")


def test_the_most_promising_layout_is_judged_next_wherever_it_is() -> None:
    judged: list[tuple[int, Choice]] = []
    finder = promising(64, judged)
    known = evaluated(SMALL, Choice(), CLUSTER, rows=64)
    found = finder.more({8: [known], 16: [known], 4096: []})
    assert found is not None and judged == [(4096, found.choice)], "nothing was known there"
    assert found.choice.data_parallel(4096) <= 64
    again = finder.more({8: [known], 16: [known], 4096: [found]})
    assert again is None or again.choice != found.choice
    assert finder.unseen() is None
    late = promising(64, judged, is_late=True)
    assert late.more({8: [known], 16: [known], 4096: []}) is None and late.unseen() == "not looked at"


def test_each_layout_of_the_scale_is_one_that_the_trainer_takes_there() -> None:
    run = recipe("infimm-llama2-13b/finetune")
    forty = parse_cluster("5x8xA100-80GB")
    traced = [
        with_rows(run, Choice(tensor=2, pipeline=pipeline, chunks=chunks, sequence_parallel=True), forty)
        for pipeline, chunks in ((1, 1), (2, 1), (2, 2), (4, 2))
    ]
    known = [evaluated(SMALL, choice, forty, rows=40) for choice in traced if 40 % choice.model_parallel == 0]
    points = scale(run, known, rate)
    planned = [point for point in points if point.evaluation]
    assert 40 in {point.gpus for point in planned} and len(planned) > 3
    for point in planned:
        assert point.evaluation is not None
        typed = point.evaluation.choice.options(run)
        check_for_world(parse_options(run, typed.split()), point.gpus)
    at_forty = next(point for point in planned if point.gpus == 40)
    assert at_forty.evaluation is not None and "rows by 40" in at_forty.evaluation.choice.name


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
