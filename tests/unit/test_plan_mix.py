"""Rows that stand for those of a step: the mean one, the worst one, and one that tells words from pictures."""

from __future__ import annotations

import pytest

from megavlm.plan.mix import mix_of
from megavlm.recipes import recipe


@pytest.mark.parametrize("name", ["aquila-vl-2b/2a", "aquila-vl-2b/4", "infimm-llama2-13b/finetune"])
def test_the_long_row_is_the_mean_one_with_more_words(name: str) -> None:
    mix = mix_of(recipe(name), from_data=False)
    lengths, tiles = zip(*mix.sizes, strict=True)
    assert (mix.worst.padded, mix.worst.tiles) == (max(lengths), max(tiles))
    assert (mix.long.padded, mix.long.tiles) == (max(lengths), mix.mean.tiles)
    assert (mix.mean.padded, mix.mean.tiles) in mix.sizes
    assert mix.long.padded - mix.long.tokens == mix.mean.padded - mix.mean.tokens
    assert mix.long.pictures == mix.mean.pictures and len(mix.long.documents) == len(mix.mean.documents)
    assert (mix.long == mix.mean) == (max(lengths) == mix.mean.padded)  # then it is not traced again


def test_the_sizes_of_a_step_add_up_to_what_passes_through() -> None:
    mix = mix_of(recipe("aquila-vl-2b/2a"), from_data=False)
    assert len(mix.sizes) == mix.rows and sum(tiles for _, tiles in mix.sizes) == mix.tiles == mix.work.tiles
    assert mix.work.tokens == mix.tokens <= sum(length for length, _ in mix.sizes)
    # Each sample sees itself alone: fewer pairs than if a row were one document.
    assert mix.tokens < mix.work.pairs < sum(length**2 for length, _ in mix.sizes) / 2


def test_rows_of_toy_text_are_all_alike() -> None:
    run = recipe("decoder-tiny")
    mix = mix_of(run, from_data=False)
    assert mix.mean == mix.worst == mix.long
    assert mix.sizes == ((run.train.micro_batch_size * run.row_tokens, 0),)
    assert mix.work.tokens == run.samples_per_step * run.row_tokens and mix.work.seeing_tokens == 0
