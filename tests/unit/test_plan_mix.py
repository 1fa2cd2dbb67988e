"""Rows that stand for those of a step: the mean one, the worst one, and one that tells words from pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megavlm.build.loader import build_words
from megavlm.build.run_config import RunConfig, check_for_world
from megavlm.data.packing import LONGER, deal_rows
from megavlm.data.step_plan import Planner, open_sources
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import parse_cluster
from megavlm.plan.judge import drawn_of, microbatches_of
from megavlm.plan.mix import Mix, mix_of
from megavlm.plan.seen import assumed_steps, dealt
from megavlm.recipes import recipe
from megavlm.toy.data import prepare_toy_data
from megavlm.toy.tokenizer import write_tokenizer


def planned(name: str, **rows: int) -> tuple[RunConfig, Mix]:
    """A recipe whose rows are packed otherwise."""
    run = recipe(name)
    assert run.data is not None
    run = run.replace(data=run.data.replace(rows=run.data.rows.replace(**rows)))
    return run, mix_of(run, from_data=False)


@pytest.mark.parametrize("name", ["aquila-vl-2b/2a", "aquila-vl-2b/4", "infimm-llama2-13b/finetune"])
def test_the_long_row_is_the_mean_one_with_more_words(name: str) -> None:
    mix = mix_of(recipe(name), from_data=False)
    assert (mix.long.padded, mix.long.tiles) == (mix.worst.padded, mix.mean.tiles)
    assert (mix.mean.padded, mix.mean.tiles) in mix.sizes
    assert mix.long.padded - mix.long.tokens == mix.mean.padded - mix.mean.tokens
    assert mix.long.pictures == mix.mean.pictures and len(mix.long.documents) == len(mix.mean.documents)
    assert (mix.long == mix.mean) == (mix.worst.padded == mix.mean.padded)  # then it is not traced again


@pytest.mark.parametrize("name", ["aquila-vl-tiny/2a", "infimm-tiny/finetune"])
def test_the_worst_row_is_that_of_many_steps_and_as_long_as_evening_out_allows(name: str) -> None:
    run = recipe(name)
    assert run.data is not None
    mix, steps = mix_of(run, from_data=False), assumed_steps(run, run.data)
    assert len(steps) > 100 and f"of {len(steps)} assumed steps" in mix.seen
    lengths, tiles = np.concatenate([step.sizes for step in steps]).T
    assert mix.worst.tiles == tiles.max() > steps[0].row_tiles.max()
    evened = LONGER * max(step.packing.row_tokens.mean() for step in steps)
    assert mix.worst.padded >= lengths.max() and evened - 1 <= mix.worst.padded <= max(lengths.max(), evened + 64)
    # Those of other seeds are no worse, but for a few.
    others = run.replace(train=run.train.replace(seed=77))
    worse = [one for one in assumed_steps(others, run.data) if one.sizes[:, 0].max() > mix.worst.padded]
    assert not worse


def test_of_prepared_data_many_steps_are_looked_at(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    prepare_toy_data(tmp_path / "data", tmp_path / "tokenizer", samples={"pairs": 40, "documents": 40})
    run = recipe("infimm-tiny/pretrain")
    assert run.data is not None
    data = run.data.replace(path=str(tmp_path / "data"), tokenizer=str(tmp_path / "tokenizer"))
    run = run.replace(data=data, train=run.train.replace(train_iters=60))
    mix, words = mix_of(run, from_data=True), build_words(run)
    planner = Planner(data, open_sources(data, words), words, run.train.seed)
    lengths, tiles = [], []
    for number in range(60):
        plan = planner.plan(number)
        lengths.append(int(plan.packing.row_lengths.max()))
        tiles += [plan.tiles[planner.samples_of(plan, row)].sum() for row in range(plan.packing.rows)]
    assert mix.worst.tiles == max(tiles) > np.mean(tiles) and mix.worst.padded >= max(lengths)
    assert "of 60 steps of the data" in mix.seen and not mix.assumptions
    assert mix.step is not None and mix.rows * 60 == len(mix.sizes) == len(tiles)
    assert mix.tiles * 60 == sum(tiles) == mix.pictures * 60  # of a tile each
    assert sum(len(row.pictures) for row in mix.step.planned) == mix.step.pictures.sum()
    assert mix_of(run.replace(parallel=run.parallel.replace(tensor_model_parallel_size=2)), True).step is mix.step


def test_no_row_is_longer_than_the_data_settings_allow() -> None:
    _, mix = planned("aquila-vl-tiny/2a", max_tokens=832)
    assert mix.worst.padded == mix.long.padded == 832
    assert "data.rows.max_tokens allows 832 tokens, nothing limits the tiles" in mix.seen and mix.longest == 832
    _, mix = planned("aquila-vl-tiny/2a", max_tiles=17)
    assert mix.worst.tiles <= 17 and "data.rows.max_tiles 17 tiles" in mix.seen


def test_the_sizes_of_a_step_add_up_to_what_passes_through() -> None:
    mix = mix_of(recipe("aquila-vl-2b/2a"), from_data=False)
    assert mix.step is not None and len(mix.step.sizes) == mix.rows == 128
    steps = len(mix.sizes) / mix.rows
    assert sum(tiles for _, tiles in mix.sizes) == pytest.approx(mix.tiles * steps)
    assert mix.tiles == mix.work.tiles == pytest.approx(mix.step.tiles.sum(), rel=0.02)
    assert sum(row.tokens for row in mix.step.planned) == mix.step.tokens.sum() == pytest.approx(mix.tokens, rel=0.02)
    assert sum(len(row.pictures) for row in mix.step.planned) == mix.step.pictures.sum()
    # Each sample sees itself alone: fewer pairs than if a row were one document.
    lengths = mix.step.sizes[:, 0].astype(float)
    assert mix.tokens < mix.work.pairs < (lengths**2).sum() / 2


@pytest.mark.parametrize(("name", "gpus"), [("infimm-tiny/pretrain", 256), ("infimm-llama2-13b/finetune", 512)])
@pytest.mark.parametrize("choice", [Choice(), Choice(pipeline=2, chunks=2)], ids=lambda choice: choice.name)
def test_fewer_samples_than_rows_leave_rows_empty_that_are_computed_all_the_same(
    name: str, gpus: int, choice: Choice
) -> None:
    copies = choice.data_parallel(gpus)
    multiple = copies * (choice.pipeline if choice.chunks > 1 else 1)
    run, mix = planned(name, rows_multiple=multiple)
    run = choice.apply(run)
    assert run.data is not None and run.data.samples_per_step < multiple == mix.rows
    if name == "infimm-llama2-13b/finetune":
        check_for_world(run, gpus)
    cluster = parse_cluster(f"{gpus // 8}x8xA100-80GB")
    microbatches = microbatches_of(run, cluster, mix)
    assert mix.step is not None
    theirs = deal_rows(mix.step.packing, copies)  # as the trainer deals them
    assert theirs.shape == (copies, microbatches) and microbatches % choice.pipeline == 0
    empty = run.data.rows.length_multiple, 0
    assert mix.sizes.count(empty) * mix.rows >= len(mix.sizes) * (mix.rows - run.data.samples_per_step)
    assert mix.mean.documents and mix.tokens < mix.rows * mix.mean.tokens
    drawn = drawn_of(mix, microbatches, copies)
    assert drawn is not None and drawn.lengths.shape == (microbatches, copies)


def test_rows_are_dealt_to_the_copies_of_the_model_as_the_loader_deals_them() -> None:
    run, mix = planned("aquila-vl-2b/3")
    assert mix.step is not None
    rows = deal_rows(mix.step.packing, 64)
    drawn = drawn_of(mix, 3, 64)
    assert drawn is not None
    assert (mix.step.packing.row_lengths[rows] == drawn.lengths.T).all()
    assert (mix.step.row_tiles[rows] == drawn.tiles.T).all()
    assert (np.diff(drawn.lengths, axis=0) <= 0).all()  # a rank's longest row first
    of_copies = drawn.tiles.sum(0)
    assert of_copies.max() < 1.1 * of_copies.mean()
    assert run.data is not None
    usual = [step.unevenness for step in assumed_steps(run, run.data) if step.packing.rows == 192]
    assert mix.step.unevenness == pytest.approx(np.mean(usual), rel=0.005) and max(usual) > min(usual) + 0.02


def test_rows_are_packed_again_for_copies_that_cannot_share_them() -> None:
    _, mix = planned("aquila-vl-2b/3")
    assert mix.step is not None
    found = dealt(mix.step, 2, 96)
    assert found is not None and found.rows.shape == (96, 2)
    assert found.step.packing.limits.rows_multiple == 192 and sorted(found.rows.flat) == [*range(192)]
    assert found.step.tokens is mix.step.tokens and found.step.row_tiles.sum() == mix.step.tiles.sum()
    drawn = drawn_of(mix, 2, 128)  # 256 rows, which are reckoned as full as the 192 that they are made of
    assert drawn is not None and drawn.tiles.mean() == pytest.approx(mix.step.tiles.sum() / 192)
    assert drawn.lengths.mean() == pytest.approx(mix.step.tokens.sum() / 192, rel=0.01)
    assert dealt(mix.step, 1, 64) is None  # the samples do not fit into 64 rows
    drawn = drawn_of(mix, 1, 64)
    assert drawn is not None and drawn.lengths.shape == (1, 64)


def test_rows_of_toy_text_are_all_alike() -> None:
    run = recipe("decoder-tiny")
    mix = mix_of(run, from_data=False)
    assert mix.mean == mix.worst == mix.long and not mix.seen
    assert mix.sizes == ((run.train.micro_batch_size * run.row_tokens, 0),)
    assert mix.work.tokens == run.samples_per_step * run.row_tokens and mix.work.seeing_tokens == 0
    assert drawn_of(mix, 8, 4) is None
