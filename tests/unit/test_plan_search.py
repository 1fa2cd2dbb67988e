"""The search for a layout: nothing that the trainer refuses or that does not fit; of the rest the fastest, soon."""

from __future__ import annotations

import functools

import pytest
from plan_profiles import MadeModel, evaluated

from megavlm.build.run_config import RunConfig, check_for_world
from megavlm.errors import LayoutError
from megavlm.options import parse_options
from megavlm.plan.choice import RECOMPUTE, Choice
from megavlm.plan.cluster import Cluster, parse_cluster
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.guess import Guess, Guesser
from megavlm.plan.search import candidates, refusal, search
from megavlm.recipes import recipe

INFIMM = recipe("infimm-llama2-13b/pretrain")
FORTY = parse_cluster("5x8xA100-80GB")
EIGHT = parse_cluster("1x8xA100-80GB")
LARGE = MadeModel(
    layers=40, tensor_message=2e7, message=2e7, activation=7 << 29, gradients=1e8, tower_flops=1e12, is_frozen=True
)
ROWS = 80


@functools.cache
def judged(model: MadeModel, choice: Choice, cluster: Cluster) -> Evaluation:
    return evaluated(model, choice, cluster, ROWS)


class Judge:
    """Judges by made-up profiles, and remembers what it was asked."""

    def __init__(self, model: MadeModel, cluster: Cluster = EIGHT) -> None:
        self.model, self.cluster = model, cluster
        self.asked: list[Choice] = []

    def __call__(self, choice: Choice) -> Evaluation:
        assert choice not in self.asked
        self.asked.append(choice)
        return judged(self.model, choice, self.cluster)


def even(choices: list[Choice]) -> list[Choice]:
    """Those that the made-up model can be cut into."""
    return [choice for choice in choices if 40 % (choice.pipeline * choice.chunks) == 0]


def test_the_best_is_the_fastest_of_all_that_fit() -> None:
    choices = even([one for one in candidates(INFIMM, EIGHT) if refusal(INFIMM, one, EIGHT) is None])
    assert len(choices) > 30
    everything = [judged(LARGE, choice, EIGHT) for choice in choices]
    fitting = sorted(one.seconds for one in everything if one.fits)
    assert fitting and len(fitting) < len(everything)
    judge = Judge(LARGE)
    found = search(INFIMM, EIGHT, judge, choices=choices, most_traces=10_000)
    assert found.best[0].evaluation.seconds == fitting[0]
    assert all(one.evaluation.fits for one in found.best) and len(found.best) == 5
    seconds = [one.evaluation.seconds for one in found.best]
    assert seconds == sorted(seconds)
    assert found.untried == 0 and found.traced == len(judge.asked) < len(choices)
    # With few traces the answer is close: what looks fast is tried first.
    quick = search(INFIMM, EIGHT, Judge(LARGE), choices=choices, most_traces=8)
    assert quick.traced == 8 and quick.untried > 0
    assert quick.best[0].evaluation.seconds <= 1.1 * fitting[0]


def test_of_layouts_that_are_about_equal_the_simple_one_is_traced_first() -> None:
    judge = Judge(MadeModel(layers=40, is_frozen=True))
    search(INFIMM, EIGHT, judge, choices=even(list(candidates(INFIMM, EIGHT))), most_traces=3)
    assert judge.asked[0].pipeline * judge.asked[0].chunks == 1


def test_what_is_traced_next_follows_from_what_was_judged() -> None:
    """Where tensor-parallel messages turn out slow, the search does not stay with them."""
    choices = [
        Choice(tensor=tensor, pipeline=pipeline, sequence_parallel=tensor > 1)
        for tensor in (2, 4, 8)
        for pipeline in (1, 2, 4)
        if tensor * pipeline <= 8
    ]
    slow = MadeModel(layers=40, is_frozen=True, tensor_message=4e9, activation=1 << 20)
    free = MadeModel(layers=40, is_frozen=True, activation=1 << 20)

    def asked(model: MadeModel) -> list[Choice]:
        judge = Judge(model)
        search(INFIMM, EIGHT, judge, choices=choices)
        return judge.asked

    assert asked(slow)[0] == asked(free)[0] and asked(slow) != asked(free)


def test_recompute_is_asked_for_only_where_it_is_needed() -> None:
    def asked_of(model: MadeModel) -> tuple[list[Choice], list[Choice]]:
        judge = Judge(model)
        choices = [Choice(tensor=2, sequence_parallel=True, recompute=level) for level in RECOMPUTE]
        found = search(INFIMM, EIGHT, judge, choices=choices)
        return judge.asked, [one.evaluation.choice for one in found.best]

    asked, best = asked_of(MadeModel(layers=40, activation=1 << 20, is_frozen=True))
    assert [choice.recompute for choice in asked] == ["none"] == [choice.recompute for choice in best]
    asked, best = asked_of(MadeModel(layers=40, activation=20 << 30, is_frozen=True))
    assert "full" in {choice.recompute for choice in best} or not best
    asked, best = asked_of(MadeModel(layers=40, layer_bytes=8 << 30))
    assert best == []


def test_failures_say_by_how_much_or_what_the_trainer_says() -> None:
    found = search(
        INFIMM, EIGHT, Judge(MadeModel(layers=40, layer_bytes=8 << 30)), choices=even(list(candidates(INFIMM, EIGHT)))
    )
    assert not found.best and len(found.failures) == 5
    assert any("GiB" in failure.reason and "more than there are" in failure.reason for failure in found.failures)
    sixteen = Choice(tensor=16)
    said = refusal(INFIMM, sixteen, FORTY)
    with pytest.raises(LayoutError) as caught:
        check_for_world(sixteen.apply(INFIMM), 40)
    assert said == str(caught.value)


def test_a_decoder_too_large_for_a_gpu_is_told_without_a_trace() -> None:
    finetune = recipe("infimm-llama2-13b/finetune")
    small = parse_cluster("1x1xA100-40GB")
    said = refusal(finetune, Choice(), small)
    assert said is not None and "weights, gradients and optimizer alone need" in said
    assert refusal(finetune, Choice(tensor=8, sequence_parallel=True), parse_cluster("4x8xH200")) is None


def test_candidates_stay_within_a_node_and_divide_the_gpus() -> None:
    for written in ("1x8xH100", "5x8xA100-80GB", "3x6xH100", "1x1xH200"):
        cluster = parse_cluster(written)
        choices = list(candidates(INFIMM, cluster))
        assert choices and len(set(choices)) == len(choices)
        for choice in choices:
            assert cluster.gpus_per_node % choice.tensor == 0 and cluster.gpus % choice.model_parallel == 0
            assert choice.sequence_parallel == (choice.tensor > 1)
    trained = recipe("aquila-vl-2b/2a")
    assert not any(choice.towers_everywhere for choice in candidates(trained, FORTY))


def test_interleaved_stages_do_not_take_turns_on_empty_rows() -> None:
    run = recipe("infimm-llama2-13b/finetune")
    choices = list(candidates(run, parse_cluster("16x8xA100-80GB")))
    assert any(choice.chunks > 1 for choice in choices)
    assert all((choice.rows_multiple or 0) <= run.samples_per_step for choice in choices if choice.chunks > 1)
    assert any((choice.rows_multiple or 0) > run.samples_per_step for choice in choices), "each copy may have one"


@pytest.mark.parametrize("name", ["infimm-llama2-13b/pretrain", "aquila-vl-2b/2a", "decoder-tiny"])
def test_options_ask_the_trainer_for_the_same_run(name: str) -> None:
    run = recipe(name)
    choices = list(candidates(run, parse_cluster("2x4xH100")))
    for choice in choices[:: max(1, len(choices) // 25)]:
        try:
            chosen = choice.apply(run)
        except LayoutError:
            continue
        assert parse_options(run, choice.options(run).split()) == chosen


def test_toy_text_is_tried_in_several_micro_batches() -> None:
    run: RunConfig = recipe("decoder-tiny")
    cluster = parse_cluster("1x2xH100")
    model = MadeModel(layers=run.decoder.num_layers, layer_bytes=1 << 20, activation=1 << 20)
    choices = [choice for choice in candidates(run, cluster) if choice.chunks == 1]
    assert {choice.micro_batch for choice in choices} == {1, 2, 4, 8}
    found = search(run, cluster, Judge(model, cluster), choices=[*choices, Choice(micro_batch=5)])
    assert found.best and found.refused > 0
    assert any("does not divide into micro-batches" in failure.reason for failure in found.failures)


def test_what_cannot_be_cut_into_stages_is_one_refused_layout_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    guess = Guesser.guess

    def refuses_two(self: Guesser, choice: Choice, cluster: Cluster) -> Guess:
        if choice.pipeline == 2:
            raise LayoutError("--pipeline-model-parallel-size", 2, "cannot be cut", "use another")
        return guess(self, choice, cluster)

    monkeypatch.setattr(Guesser, "guess", refuses_two)
    choices = even([one for one in candidates(INFIMM, EIGHT) if refusal(INFIMM, one, EIGHT) is None])
    found = search(INFIMM, EIGHT, Judge(LARGE), choices=choices, most_traces=3)
    assert found.best and all(one.evaluation.choice.pipeline != 2 for one in found.best)
    assert found.refused == sum(choice.pipeline == 2 for choice in choices) > 0
