"""What the loader must deliver, and that a step waits for it where CPU cores do not suffice."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from plan_profiles import MadeModel, evaluated, rate

from megavlm.data.packing import deal_rows
from megavlm.parallel.media_inputs import SplicedInputs
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import parse_cluster
from megavlm.plan.cost import CALIBRATION, Calibration, Decoding
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.loading import Loading, loading_lines, loading_of, with_loading
from megavlm.plan.mix import mix_of
from megavlm.plan.report import split_lines
from megavlm.plan.scale import scale
from megavlm.recipes import recipe

CLUSTER = parse_cluster("2x8xH100")
RUN = recipe("infimm-zephyr-7b/pretrain")
MIX = dataclasses.replace(mix_of(recipe("infimm-tiny/pretrain"), False), pictures=3200.0, tiles=12_800.0, step=None)
"""Dealt evenly, since no step is known."""
SMALL = MadeModel(layers=40, layer_bytes=1 << 20, activation=1 << 20)
SLOW = Decoding(pictures=20.0, tiles=400.0, source="made up")


def judged(choice: Choice | None = None) -> Evaluation:
    choice = choice or Choice()
    return evaluated(SMALL, choice, CLUSTER, rows=64)


def needs(one: Evaluation, decoding: Decoding = SLOW, **data: int) -> Loading:
    assert RUN.data is not None
    found = loading_of(RUN.replace(data=RUN.data.replace(**data)), one, MIX, decoding)
    assert found is not None
    return found


def test_each_gpu_that_encodes_gets_its_share_of_pictures() -> None:
    one = judged()
    found = needs(one)
    assert found.pictures_per_second == pytest.approx(3200 / 16 / one.seconds)
    assert found.tiles_per_second == pytest.approx(12_800 / 16 / one.seconds)
    assert found.needed == pytest.approx(max(3200 / 20, 12_800 / 400) / 16 / one.seconds)
    many = needs(one, Decoding(pictures=20.0, tiles=40.0, source="made up"))
    assert many.core_seconds == pytest.approx(12_800 / 40 / 16)  # tiles take longer than pictures
    staged, everywhere = Choice(pipeline=4), Choice(pipeline=4, towers_everywhere=True)
    assert needs(judged(staged)).pictures == 4 * needs(judged(everywhere)).pictures == 800
    said = " ".join(loading_lines(found))
    assert f"{found.pictures_per_second:,.1f} pictures/s" in said and "for a node" in said
    assert f"takes {found.needed:.1f} CPU cores of that GPU; it has {found.threads} threads" in said


@pytest.mark.parametrize(
    "choice",
    [Choice(tensor=8), Choice(tensor=4, pipeline=2), Choice(tensor=2, pipeline=4, towers_everywhere=True)],
    ids=lambda choice: choice.name,
)
def test_a_picture_stays_together_so_that_one_rank_has_more_to_decode(choice: Choice) -> None:
    run = recipe("aquila-vl-2b/3")
    mix = mix_of(run, from_data=False)
    copies = choice.data_parallel(CLUSTER.gpus)
    one = dataclasses.replace(judged(choice), microbatches=int(mix.rows) // copies)
    found, step = loading_of(run, one, mix, Decoding(pictures=1e6, tiles=400.0, source="made up")), mix.step
    assert found is not None and step is not None
    group = SimpleNamespace(size=lambda: choice.model_parallel if choice.towers_everywhere else choice.tensor)
    groups = SimpleNamespace(collection=SimpleNamespace(tp=group, mp=group), pipeline_rank=0)
    held = np.zeros(group.size())  # tiles of each rank over all copies, as the trainer's ranks say themselves
    for rows in deal_rows(step.packing, copies).tolist():
        tiles = [[picture.tiles for picture in step.row(row).pictures] for row in rows]
        for rank in range(group.size()):
            group.rank = lambda rank=rank: rank
            inputs = SplicedInputs(None, 729, cast(Any, groups), choice.towers_everywhere, sequence_parallel=False)
            own = inputs.own_pictures(tiles)
            held[rank] += sum(of_row[one] for of_row, mine in zip(tiles, own, strict=True) for one in mine)
    most = held.max() / copies * mix.tiles / step.tiles.sum()
    assert found.tiles == pytest.approx(most) and found.core_seconds == pytest.approx(most / 400)
    assert found.tiles > (1.0 if choice.towers_everywhere else 1.5) * mix.tiles / copies / group.size()
    assert found.tiles_of_node == pytest.approx(mix.tiles * min(8 / copies / group.size(), 1))


def test_a_step_waits_for_what_threads_and_cores_cannot_do() -> None:
    one = judged()
    taken = 3200 / 16 / 20
    assert needs(one, threads=4).waits == max(taken / 4 - one.seconds, 0)
    assert needs(one, threads=1).waits == pytest.approx(max(taken - one.seconds, 0))
    assert needs(one, threads=0).waits == pytest.approx(taken)  # while nothing is computed
    slow = Decoding(pictures=0.5, tiles=400.0, source="made up")
    assert needs(one, slow, threads=64).waits == pytest.approx(3200 / 16 / 0.5 / 16 - one.seconds)  # 16 cores
    assert "use --num-workers" in list(loading_lines(needs(one, slow, threads=2)))[-1]
    assert "more CPU cores" in list(loading_lines(needs(one, slow, threads=64)))[-1]


def test_what_is_waited_for_is_part_of_the_step_and_limits_its_scale() -> None:
    slow = Decoding(pictures=0.5, tiles=400.0, source="made up")
    one = judged()
    late = with_loading(RUN, one, MIX, slow)
    assert RUN.data is not None and late.step.split["data"] == pytest.approx(3200 / 16 / 0.5 / 4 - one.seconds)
    assert sum(late.step.split.values()) == pytest.approx(late.seconds)
    assert late.mfu < one.mfu and any("data" in line for line in split_lines(late.step))
    again = loading_of(RUN, late, MIX, slow)
    assert again is not None and again.step == pytest.approx(one.seconds)  # nothing is counted twice
    assert with_loading(RUN, one, MIX, Decoding(pictures=1e6, tiles=1e6, source="made up")) is one
    points = scale(RUN, [late], rate, gpus=[16], finished=lambda found: with_loading(RUN, found, MIX, slow))
    assert points[0].evaluation is not None and points[0].evaluation.seconds == pytest.approx(late.seconds)
    assert points[0].limit.startswith("reading and decoding pictures")


def test_text_waits_for_nothing_and_the_rate_has_its_source() -> None:
    toys = recipe("decoder-tiny")
    one = judged()
    assert loading_of(toys, one, mix_of(toys, False), SLOW) is None
    assert with_loading(toys, one, mix_of(toys, False), SLOW) is one
    decoding = Calibration.load(CALIBRATION).decoding
    assert decoding is not None and "data-path.json" in decoding.source
    assert mix_of(recipe("aquila-vl-tiny/2a"), False).pictures < mix_of(recipe("aquila-vl-tiny/2a"), False).tiles


def test_a_cluster_says_how_many_cores_it_has() -> None:
    assert CLUSTER.cores_per_gpu == 16
    assert needs(dataclasses.replace(judged(), cluster=CLUSTER.replace(cores_per_gpu=2.0)), threads=8).at_work == 2
