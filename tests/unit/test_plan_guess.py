"""Guesses of layouts that were not traced: all that takes time is in them, and judged layouts correct them."""

from __future__ import annotations

import dataclasses

import pytest
from plan_profiles import MadeModel, evaluated

from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster, parse_cluster
from megavlm.plan.guess import Corrected, Guesser, StepRows
from megavlm.plan.mix import mix_of
from megavlm.recipes import recipe

FINETUNE = recipe("infimm-llama2-13b/finetune")
PRETRAIN = recipe("infimm-llama2-13b/pretrain")
FORTY = parse_cluster("5x8xA100-80GB")


def split(tensor: int, pipeline: int, chunks: int = 1) -> Choice:
    return Choice(tensor=tensor, pipeline=pipeline, chunks=chunks, sequence_parallel=tensor > 1)


def seconds(choice: Choice, cluster: Cluster = FORTY) -> float:
    return Guesser(FINETUNE, StepRows.of(mix_of(FINETUNE, from_data=False))).guess(choice, cluster).seconds


def test_gradients_that_all_copies_share_are_not_free() -> None:
    # Traced: 0.87 s with 20 copies of the whole decoder, 0.53 s with one copy, 0.51 s with two.
    assert seconds(split(2, 1)) > 1.3 * seconds(split(4, 10)) > 1.3 * seconds(split(4, 5, 2))
    frozen = Guesser(PRETRAIN).guess(split(2, 1), FORTY)
    learning = Guesser(PRETRAIN.replace(trainable=FINETUNE.trainable)).guess(split(2, 1), FORTY)
    assert learning.static > 2 * frozen.static and learning.seconds > frozen.seconds


def test_interleaving_costs_a_shape_for_each_chunk_and_microbatch() -> None:
    slow = FORTY.replace(between=FORTY.between.replace(latency_us=5e3, small_latency_us=5e3))
    assert seconds(split(4, 10, 4), slow) > 1.3 * seconds(split(4, 10, 2), slow)


def test_rows_are_those_that_the_copies_share() -> None:
    step = StepRows.of(mix_of(FINETUNE, from_data=False))
    rows, tokens = step.shared(dataclasses.replace(split(2, 1), rows_multiple=40), FINETUNE)
    assert rows == 40 and rows * tokens == pytest.approx(step.rows * step.tokens)
    toy = recipe("decoder-tiny")
    assert StepRows.full(toy).shared(Choice(micro_batch=2), toy) == (toy.samples_per_step / 2, 2 * toy.row_tokens)


def test_what_was_judged_corrects_what_is_like_it_most() -> None:
    cluster = parse_cluster("1x8xA100-80GB")
    choices = [split(2, 1), split(2, 2), split(8, 1)]
    guesses = {choice: Guesser(PRETRAIN).guess(choice, cluster) for choice in choices}
    corrected = Corrected(guesses)
    assert [corrected.estimate(one).seconds for one in choices] == [guesses[one].seconds for one in choices]
    model = MadeModel(layers=40, is_frozen=True)
    slow, fast = (evaluated(model, choice, cluster) for choice in (choices[0], choices[2]))
    slow, fast = (
        dataclasses.replace(one, step=dataclasses.replace(one.step, seconds=times * guesses[one.choice].seconds))
        for one, times in ((slow, 2.0), (fast, 0.5))
    )
    corrected.learn(slow)
    assert corrected.estimate(choices[1]).seconds == pytest.approx(2 * guesses[choices[1]].seconds)
    corrected.learn(fast)
    assert 1 < corrected.estimate(choices[1]).seconds / guesses[choices[1]].seconds < 2
    assert corrected.estimate(choices[2]).seconds < guesses[choices[2]].seconds
