"""What a search and a scaling say on a terminal."""

from __future__ import annotations

import pytest
from plan_profiles import MadeModel, evaluated, rate

from megavlm.plan.choice import Choice
from megavlm.plan.cluster import parse_cluster
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.report import NAMES, scale_report, search_report, split_lines
from megavlm.plan.scale import scale
from megavlm.plan.search import SearchResult, search
from megavlm.plan.step import SPLIT
from megavlm.recipes import recipe

RUN = recipe("infimm-llama2-13b/pretrain").override("parallel.tensor_model_parallel_size=4")
CLUSTER = parse_cluster("1x8xA100-80GB")
MODEL = MadeModel(layers=40, activation=3 << 30, tensor_message=1e8, message=4e7, gradients=4e9, is_frozen=True)


@pytest.fixture(scope="module")
def found() -> SearchResult:
    choices = [Choice(tensor=t, pipeline=p, sequence_parallel=t > 1) for t in (1, 2, 4, 8, 16) for p in (1, 2, 3)]
    choices = [choice for choice in choices if choice.pipeline < 3 or choice.tensor == 1]
    return search(RUN, CLUSTER, lambda choice: evaluated(MODEL, choice, CLUSTER, 80), choices=choices)


def test_a_search_says_what_is_best_why_and_how_to_ask_for_it(found: SearchResult) -> None:
    said = search_report(found, RUN)
    lines = said.splitlines()
    assert max(map(len, lines)) <= 110
    for place, ranked in enumerate(found.best, 1):
        (line,) = [line for line in lines if line.startswith(f"  {place}  ")]
        assert ranked.evaluation.choice.name in line and f"{ranked.evaluation.seconds:.3g}" in line
    assert "% slower" in said and "tensor-parallel messages" in said and "GiB left" in said
    words = said[said.index("options:") :].split()
    asked = words[1 : 1 + len(found.best[0].evaluation.choice.options(RUN).split())]
    assert asked and asked == found.best[0].evaluation.choice.options(RUN).split()
    assert "TP 16" in said and "more than there are" in said


def test_a_search_without_an_answer_says_why(found: SearchResult) -> None:
    heavy = MadeModel(layers=40, layer_bytes=8 << 30)
    nothing = search(RUN, CLUSTER, lambda choice: evaluated(heavy, choice, CLUSTER, 80), choices=[Choice()])
    said = search_report(nothing, RUN)
    assert "none of them works" in said and "each GPU needs" in said


def test_a_search_that_was_cut_short_does_not_speak_for_what_it_left_out() -> None:
    heavy = MadeModel(layers=40, layer_bytes=8 << 30)
    choices = [Choice(tensor=t, sequence_parallel=t > 1) for t in (1, 2, 4)]
    some = search(RUN, CLUSTER, lambda choice: evaluated(heavy, choice, CLUSTER, 80), choices=choices, most_traces=1)
    assert "none of those that were traced works" in search_report(some, RUN)


def test_scaling_has_a_line_for_each_size_and_names_limits() -> None:
    known: Evaluation = evaluated(MODEL, Choice(tensor=2, sequence_parallel=True), CLUSTER, 80)
    points = scale(RUN, [known], rate)
    said = scale_report(points)
    rows = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
    assert {f"{point.gpus:,}" for point in points} < set(rows)
    assert "100%" in rows["8"] and "the recipe's batch (80 rows for 128 copies" in rows["256"] and "4,096" in rows
    assert said.splitlines()[-1].startswith("from 256 GPUs on: the recipe's batch")


def test_the_split_of_a_step_lists_all_that_takes_time() -> None:
    step = evaluated(MODEL, Choice(tensor=2, pipeline=2, sequence_parallel=True), CLUSTER, 80).step
    lines = split_lines(step)
    assert len(lines) == sum(seconds > 0 for seconds in step.split.values())
    assert "decoder" in lines[0] and "100% matmul" in lines[0]
    assert set(NAMES) == set(SPLIT)
