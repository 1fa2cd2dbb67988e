"""A step's time out of profiles: what each part adds, what hides, and that the split is the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plan_profiles import FLOPS_PER_SECOND, MadeModel, evaluated, parallel_of, rate

from megavlm.build.model import with_layout
from megavlm.build.run_config import DataParallelConfig
from megavlm.parallel.layout import layers_of_chunks
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import GIB, parse_cluster
from megavlm.plan.cost import CALIBRATION, Calibration
from megavlm.plan.judge import rate_of
from megavlm.plan.judge import timed as judge_time
from megavlm.plan.mix import Mix
from megavlm.plan.rows import PlannedDocument, PlannedRow
from megavlm.plan.scale import scale
from megavlm.plan.step import SPLIT, DrawnRows, StepTime, drawn_rows, step_time
from megavlm.recipes import recipe

CLUSTER = parse_cluster("4x8xH100")
CHOICES = [
    Choice(),
    Choice(tensor=2, sequence_parallel=True),
    Choice(tensor=2, pipeline=4),
    Choice(pipeline=4, chunks=2),
    Choice(tensor=4, pipeline=2, recompute="full"),
    Choice(pipeline=2, towers_everywhere=True),
]
FULL = MadeModel(
    tower_flops=2e11, head_flops=3e11, images=(4, 9), message=8e7, tensor_message=4e7, gradients=1e9, layer_flops=7e11
)


def timed(model: MadeModel, choice: Choice, microbatches: int = 8, **settings: object) -> StepTime:
    profiles = model.profiles(choice, choice.data_parallel(CLUSTER.gpus))
    return step_time(profiles, CLUSTER, parallel_of(choice), microbatches, rate, **settings)  # type: ignore[arg-type]


def test_one_stage_without_messages_takes_the_sum_of_its_work() -> None:
    step = timed(MadeModel(layers=16, tower_flops=1e11), Choice(), 8)
    expected = 8 * (16 * 3 * 1e12 + 4 * 1e11) / FLOPS_PER_SECOND
    assert step.seconds == pytest.approx(expected)
    assert step.split["decoder"] == pytest.approx(8 * 48e12 / FLOPS_PER_SECOND)
    assert step.bounds["tower"].kind == "matmul" and step.bounds["tower"].share == 1


@pytest.mark.parametrize(("pipeline", "chunks"), [(2, 1), (4, 1), (4, 2), (2, 4)])
def test_even_stages_have_the_known_bubble(pipeline: int, chunks: int) -> None:
    step = timed(MadeModel(), Choice(pipeline=pipeline, chunks=chunks), 8)
    work = 8 * 48e12 / pipeline / FLOPS_PER_SECOND
    assert step.split["bubble"] == pytest.approx(work * (pipeline - 1) / (8 * chunks))
    assert step.seconds == pytest.approx(work + step.split["bubble"] + step.split["messages"])


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_the_split_is_the_whole_step(choice: Choice) -> None:
    rows = drawn_rows([(900, 2), (1000, 4), (1100, 9)], 8, choice.data_parallel(32))
    for settings in ({}, {"rows": rows}, {"data_parallel": DataParallelConfig(overlap_grad_reduce=True)}):
        step = timed(FULL, choice, 8, **settings)
        assert sum(step.split.values()) == pytest.approx(step.seconds)
        assert set(step.split) == set(SPLIT) and min(step.split.values()) >= -1e-12
        assert sum(step.groups.values()) == pytest.approx(step.split["communication"])


def test_frozen_layers_cost_two_thirds() -> None:
    trained, frozen = (timed(MadeModel(is_frozen=is_frozen), Choice()) for is_frozen in (False, True))
    assert frozen.seconds == pytest.approx(trained.seconds * 2 / 3)


def test_tensor_messages_stand_in_the_way_and_gradients_hide_behind_a_pass() -> None:
    choice = Choice(tensor=4)
    quiet, loud = (timed(MadeModel(tensor_message=size), choice) for size in (0.0, 5e7))
    once = CLUSTER.collective_seconds("all_reduce", 5e7, CLUSTER.span("tp", 4, 1))
    assert loud.seconds - quiet.seconds == pytest.approx(8 * 2 * 16 * once)
    assert loud.groups["tp"] == pytest.approx(8 * 2 * 16 * once)
    plain = timed(MadeModel(gradients=1e9), choice)
    hidden = timed(MadeModel(gradients=1e9), choice, data_parallel=DataParallelConfig(overlap_grad_reduce=True))
    span = CLUSTER.span("dp", 4, 1)
    scatter, gather = (CLUSTER.collective_seconds(op, 1e9, span) for op in ("reduce_scatter", "all_gather"))
    assert plain.seconds == pytest.approx(quiet.seconds + scatter + gather + 4e-3)
    assert hidden.seconds == pytest.approx(quiet.seconds + gather + 4e-3)


def test_messages_between_stages_are_counted_where_they_delay() -> None:
    quiet, loud = (timed(MadeModel(message=size), Choice(pipeline=4)) for size in (0.0, 1e9))
    assert quiet.split["messages"] < 1e-3 < loud.split["messages"]
    assert loud.seconds - quiet.seconds == pytest.approx(loud.split["messages"] - quiet.split["messages"])


def test_a_tower_in_front_is_waited_for_and_one_everywhere_is_not() -> None:
    model = MadeModel(tower_flops=4e11)
    first = timed(model, Choice(pipeline=4))
    assert first.busiest == 0 and first.split["tower"] > 0
    everywhere = timed(model, Choice(pipeline=4, towers_everywhere=True))
    assert everywhere.before == pytest.approx(8 * 4 * 4e11 / FLOPS_PER_SECOND)
    assert everywhere.pipeline.seconds < first.pipeline.seconds


def alike(length: int, tiles: int) -> DrawnRows:
    return DrawnRows(np.full((8, 16), float(length)), np.full((8, 16), float(tiles)))


@pytest.mark.parametrize("choice", [Choice(), Choice(tensor=2)], ids=lambda choice: choice.name)
def test_words_and_images_of_uneven_rows_are_told_apart(choice: Choice) -> None:
    """The worst row is a longer one, whose words are no business of its images."""
    model = MadeModel(tower_flops=2e11, head_flops=1e12, images=(4, 12), lengths=(1000, 1500))
    mean = timed(model, choice).seconds
    of_words = 8 * (16 * 3e12 + 1e12) / FLOPS_PER_SECOND / choice.tensor
    of_tile = 8 * 2e11 / FLOPS_PER_SECOND / choice.tensor
    for length, tiles in ((1000, 4), (1000, 12), (1500, 4), (1500, 12), (800, 7)):
        more = timed(model, choice, rows=alike(length, tiles)).seconds - mean
        assert more == pytest.approx((length / 1000 - 1) * of_words + (tiles - 4) * of_tile)


def test_uneven_images_make_the_step_longer_and_the_mean_does_not() -> None:
    model = MadeModel(tower_flops=2e11, images=(4, 12))
    choice = Choice(pipeline=2)
    mean = timed(model, choice)
    even = timed(model, choice, rows=alike(1000, 4))
    assert even.seconds == pytest.approx(mean.seconds) and even.split["imbalance"] == pytest.approx(0)
    drawn = timed(model, choice, rows=drawn_rows([*4 * [(1000, 0), (1000, 4)], *2 * [(1000, 12)]], 8, 16))
    assert drawn.seconds > mean.seconds and drawn.split["imbalance"] > 0
    worst = timed(model, choice, rows=alike(1000, 12))
    assert worst.pipeline.busy[0, 0] - mean.pipeline.busy[0, 0] == pytest.approx(8 * 8 * 2e11 / FLOPS_PER_SECOND)


def test_the_cut_by_cost_is_followed_into_uneven_chunks() -> None:
    choice = Choice(pipeline=4, chunks=2)
    run = choice.apply(recipe("infimm-llama2-13b/pretrain"))
    cut = with_layout(run)
    layers = layers_of_chunks(cut.parallel, 40)
    assert layers[0] != layers[4] and sum(layers[0::4]) == sum(layers[3::4])
    row = PlannedRow((PlannedDocument(1000),), 1024)
    mix = Mix(row, row, row, 64, 64_000.0, 0.0, 0.0, 0.0, ((1024, 0),), ())
    profiles = MadeModel(layers=40).profiles(choice, 8)
    efficiency = Calibration.load(CALIBRATION).of(CLUSTER.chip.name)
    by_cost, by_hand = (judge_time(one, CLUSTER, mix, profiles, efficiency) for one in (run, cut))
    assert by_cost.seconds == by_hand.seconds
    # With equal chunks the first microbatch would be through sooner.
    even = step_time(profiles, CLUSTER, run.parallel, 8, rate_of(run, CLUSTER, efficiency))
    assert by_cost.seconds > even.seconds
    known = replace(evaluated(MadeModel(layers=40), choice, CLUSTER), step=by_cost, microbatches=8)
    (point,) = scale(run, [known], rate_of(run, CLUSTER, efficiency), gpus=[32])
    assert point.evaluation is not None and point.evaluation.seconds == pytest.approx(by_hand.seconds)


def test_rows_are_drawn_whole_and_the_same_each_time() -> None:
    sizes = [(900, 1), (900, 1), (900, 1), (1200, 5)]
    first, second = (drawn_rows(sizes, 400, 64) for _ in range(2))
    assert (first.lengths == second.lengths).all() and (first.tiles == second.tiles).all()
    assert set(zip(first.lengths.flat, first.tiles.flat, strict=True)) == {(900.0, 1.0), (1200.0, 5.0)}
    assert (first.tiles == 5).mean() == pytest.approx(0.25, abs=0.02)
    assert drawn_rows([(900, 1)], 4, 100_000).tiles.shape[1] < 1000


def test_an_evaluation_says_what_fits_and_how_fast_it_is() -> None:
    cluster = parse_cluster("1x8xA100-80GB")
    good = evaluated(MadeModel(), Choice(tensor=8), cluster)
    # 16 layers of half a GiB over 8 ranks: 1 of weights, 2 of gradients, 6 of optimizer, 2 of activations, 5 % slack.
    assert good.needed / GIB == pytest.approx(1.05 * 11) and good.fits
    assert good.mfu == pytest.approx(good.flops / good.seconds / (8 * 312e12))
    assert good.tokens_per_second == pytest.approx(64_000 / good.seconds)
    bad = evaluated(MadeModel(layer_bytes=2 * GIB), Choice(pipeline=2), cluster)
    assert not bad.fits and bad.fullest == 0
    assert bad.misfit.startswith("stage 0 of 2 needs") and f"{bad.over / GIB:.1f} more" in bad.misfit


def test_longer_rows_than_were_looked_at_need_more_by_what_tokens_cost() -> None:
    one = evaluated(MadeModel(lengths=(1000, 1500)), Choice(pipeline=2), CLUSTER)
    profiles = []
    for profile in one.profiles:
        wider = {}
        for name, more in {"long": 500, "worst": 700}.items():
            row = getattr(profile, name)
            wider[name] = replace(row, memory=replace(row.memory, activations=row.memory.activations + (more << 20)))
        profiles.append(replace(profile, **wider))
    found = replace(one, profiles=tuple(profiles))
    assert found.needed_with(1500) == pytest.approx(found.needed)
    assert found.needed_with(2000) == pytest.approx(found.needed + 1.05 * (500 << 20))
    assert one.needed_with(9000) == pytest.approx(one.needed)  # where tokens cost nothing


@pytest.mark.parametrize("name", ["mean", "worst", "long"])
def test_memory_is_that_of_the_row_that_needs_most(name: str) -> None:
    """A mean row's pictures may be dealt less evenly over tensor-parallel ranks than those of the worst."""
    good = evaluated(MadeModel(), Choice(pipeline=2), parse_cluster("1x8xA100-80GB"))
    stage = good.profiles[1]
    row = getattr(stage, name)
    heavier = replace(row, memory=replace(row.memory, activations=row.memory.activations + (70 << 30)))
    one = replace(good, profiles=(good.profiles[0], replace(stage, **{name: heavier})))
    assert good.fits and not one.fits and one.fullest == 1
    assert one.memory == [good.profiles[0].worst.memory, heavier.memory] and one.heaviest[1] is heavier
    assert f"GiB with {name} rows, " in one.misfit
