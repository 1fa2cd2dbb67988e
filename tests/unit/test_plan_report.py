"""What a search and a scaling say on a terminal."""

from __future__ import annotations

import dataclasses

import pytest
from plan_profiles import MadeModel, evaluated, rate

from megavlm import cli
from megavlm.errors import ConfigError
from megavlm.options import parse_options
from megavlm.plan.as_data import as_data
from megavlm.plan.choice import RECOMPUTE, Choice
from megavlm.plan.cluster import parse_cluster
from megavlm.plan.cost import Decoding, Efficiency
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.mix import mix_of
from megavlm.plan.planner import StagePlan
from megavlm.plan.report import NAMES, scale_report, search_report, split_lines
from megavlm.plan.scale import scale
from megavlm.plan.search import SearchResult, search
from megavlm.plan.step import SPLIT
from megavlm.plan.text import stage_report, stages_report
from megavlm.recipes import recipe

RUN = recipe("infimm-llama2-13b/pretrain").override("parallel.tensor_model_parallel_size=4")
CLUSTER = parse_cluster("1x8xA100-80GB")
EFFICIENCY = Efficiency(matmul=0.7, attention=0.5, memory=0.9)
DECODING = Decoding(pictures=20, tiles=200, source="made up")
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


def test_of_packed_rows_it_is_said_that_their_length_was_kept_and_how_to_change_it(found: SearchResult) -> None:
    assert RUN.data is not None and found.row_tokens == RUN.data.rows.max_tokens
    said = " ".join(search_report(found, RUN).split())
    assert "one packed row, of at most 2,048 tokens" in said and "data.rows.max_tokens=N" in said
    other = parse_options(RUN, ["data.rows.max_tokens=1024"])
    assert other.data is not None and other.data.rows.max_tokens == 1024
    toys = recipe("decoder-tiny")
    model = MadeModel(layers=toys.decoder.num_layers)
    choices = [Choice(micro_batch=2)]
    small = search(toys, CLUSTER, lambda choice: evaluated(model, choice, CLUSTER, 80), choices=choices)
    assert small.row_tokens is None and "max_tokens" not in search_report(small, toys)


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


def test_layouts_that_were_not_traced_are_told_as_estimates() -> None:
    heavy = MadeModel(layers=40, activation=3 << 30, is_frozen=True)
    choices = [
        Choice(tensor=t, pipeline=p, sequence_parallel=t > 1, recompute=recompute)
        for t in (1, 2, 4)
        for p in (1, 2)
        for recompute in RECOMPUTE
    ]
    some = search(RUN, CLUSTER, lambda choice: evaluated(heavy, choice, CLUSTER, 80), choices=choices, most_traces=2)
    assert some.untried and some.next
    assert all(one.fits(CLUSTER) for one in some.next) and not any(one.fits(CLUSTER) for one in some.misfits)
    for estimates in (some.next, some.misfits):
        assert [one.seconds for one in estimates] == sorted(one.seconds for one in estimates)
        layouts = [dataclasses.replace(one.choice, recompute="none") for one in estimates]
        assert len(set(layouts)) == len(layouts), "the one that recomputes least stands for the others"
    said = search_report(some, RUN)
    behind = said[said.index("the next by estimate, not traced:") :]
    assert all(one.choice.name in behind for one in (*some.next, *some.misfits))
    assert ("does not fit, by estimate, not traced" in said) == bool(some.misfits)


def test_a_step_is_split_as_its_busiest_stage_spends_it() -> None:
    mix = mix_of(RUN, from_data=False)
    for choice, expected in ((Choice(pipeline=2), "s; of stage 1 of 2, the busiest:"), (Choice(), "s:")):
        one = evaluated(dataclasses.replace(MODEL, head_flops=9e12), choice, CLUSTER, 80)
        plan = StagePlan(name="x", asked=RUN, run=RUN, evaluation=one, mix=mix)
        said = stage_report(plan, EFFICIENCY, DECODING)
        (line,) = [line for line in said.splitlines() if line.startswith("a step takes")]
        assert line.endswith(expected)
        (stage,) = as_data("x", [plan], CLUSTER, EFFICIENCY, DECODING)["stages"]
        assert stage["busiest_stage"] == choice.pipeline - 1


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


def test_a_plan_gives_days_beside_hours_for_the_floor_too_and_what_was_not_published() -> None:
    run = recipe("decoder-tiny")
    one = evaluated(MODEL, Choice(tensor=8, sequence_parallel=True), CLUSTER, 80)
    plan = StagePlan(name="a/b", asked=run, run=run, evaluation=one, mix=mix_of(run, False), notes=("nobody said.",))
    said = stage_report(plan, EFFICIENCY, DECODING)
    hours, floor = plan.hours, plan.hours * one.mfu
    assert f": {hours:,.1f} hours ({hours / 24:,.1f} days), " in said and "\nnobody said.\n" in said
    assert f"at 100 % of the peak {floor:,.1f} hours ({floor / 24:,.1f} days)" in said
    refused = StagePlan(
        name="a/c", asked=run, run=run, refused=ConfigError("x", 1, "is bad", "use 2"), notes=plan.notes
    )
    both = stages_report("a", [plan, refused], CLUSTER)
    assert both.count("nobody said.") == 1 and "x = 1: is bad; use 2" in both
    assert f"({hours / 24:,.1f} days), {hours * 8:,.0f} GPU-hours in the 1 of 2 stages that work; at 100 %" in both


def test_of_the_papers_runs_a_plan_says_that_no_duration_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("infimm-zephyr-7b", "aquila-vl-2b"):
        assert cli.main(["plan", name, "--cluster", "1x8xH100", "--tensor-model-parallel-size", "3"]) == 2
        assert "neither hours nor throughput: the plan can be judged plausible" in capsys.readouterr().out
    assert cli.main(["plan", "infimm-tiny", "--cluster", "1x8xH100", "--tensor-model-parallel-size", "3"]) == 2
    assert "published" not in capsys.readouterr().out
