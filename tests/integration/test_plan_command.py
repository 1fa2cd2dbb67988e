"""`megavlm plan` from its arguments: what it prints, and what it refuses in the trainer's own words."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from megavlm import cli
from megavlm.build.run_config import check_for_world
from megavlm.data.toy_world.samples import toy_sample
from megavlm.errors import LayoutError
from megavlm.options import parse_options
from megavlm.recipes import recipe
from megavlm.testing import spawn
from megavlm.toy.data import prepare_toy_data, toy_world
from megavlm.toy.tokenizer import write_tokenizer


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["plan", *arguments])
    return code, out.getvalue(), err.getvalue()


def plan(*arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command, in a process of its own."""
    (done,) = spawn(run_command, 1, list(arguments), timeout=600)
    found: tuple[int, str, str] = done
    return found


def test_a_stage_in_a_given_layout() -> None:
    code, out, err = plan(
        "infimm-tiny/pretrain", "--cluster", "1x2xA100-80GB", "--tensor-model-parallel-size", "2", "--json"
    )
    assert code == 0, err
    whole = json.loads(out)
    assert whole["gpus"] == 2 and whole["totals"]["stages"] == 1 and not whole["totals"]["do_not_work"]
    (found,) = whole["stages"]
    assert found["works"] and found["fits"] and found["search"] is None and found["scale"] == []
    assert found["layout"]["tensor"] == 2 and found["layout"]["options"] == "--tensor-model-parallel-size 2"
    assert sum(found["split_seconds"].values()) == pytest.approx(found["step_seconds"])
    assert found["hours"] == pytest.approx(found["steps"] * found["step_seconds"] / 3600)
    assert found["floor_hours"] == pytest.approx(found["hours"] * found["mfu"])
    assert found["floor_days"] == found["floor_hours"] / 24
    assert not found["notes"]  # nobody published anything of a toy
    (stage,) = found["pipeline_stages"]
    assert stage["worst"]["images"] >= stage["mean"]["images"] > 0
    memory = stage["mean"]["memory"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")


def test_a_stage_that_does_not_work_costs_the_others_nothing() -> None:
    layouts = ("--tensor-model-parallel-size", "2", "multitask:--tensor-model-parallel-size=3")
    code, out, err = plan("infimm-tiny", "--cluster", "1x2xA100-80GB", *layouts)
    reason = "parallel.tensor_model_parallel_size = 3: does not divide 4 attention heads"
    assert code == 2 and err.count("\n") == 1 and f"error: infimm-tiny/multitask: {reason}" in err, err
    assert f"infimm-tiny/multitask has no plan: {reason}" in out
    for stage in ("pretrain", "finetune"):
        assert f"infimm-tiny/{stage} on 1x2xA100-80GB: TP 2" in out
    assert "GPU-hours in the 2 of 3 stages that work" in out
    assert "finetune:--tensor-model-parallel-size 2" in out


def test_data_of_a_model_have_its_searches_and_sums_and_only_documented_names() -> None:
    asked = ("--cluster", "1x1xA100-80GB", "--stages", "2a,2b,2c", "2b:--tensor-model-parallel-size=3")
    code, out, err = plan("aquila-vl-tiny", *asked, "--scale", "--json")
    assert code == 2 and "aquila-vl-tiny/2b" in err, err
    whole = json.loads(out)
    first, refused, taken = whole["stages"]
    assert first["search"]["traced"] == 1 and first["search"]["best"][0]["layout"]["tensor"] == 1
    assert "GiB left" in first["search"]["best"][0]["reason"]
    assert first["layout"]["options"] == ""  # the search took the run's own
    assert [point["gpus"] for point in first["scale"]] == [1, 8, *(2**n for n in range(4, 13))]
    assert first["scale"][-1]["limit"] and first["scale"][0]["per_gpu"] == 1
    assert not refused["works"] and "= 3: does not divide" in refused["problem"] and "hours" not in refused
    assert taken["layout_of"] == "aquila-vl-tiny/2a" and taken["search"] is None
    assert whole["totals"]["do_not_work"] == ["aquila-vl-tiny/2b"]
    assert whole["totals"]["hours"] == pytest.approx(first["hours"] + taken["hours"])
    documented = Path(__file__).parents[2].joinpath("docs", "plan_json.md").read_text()
    assert [name for name in names_in(whole) if f"`{name}`" not in documented] == []


FREE_NAMES = ("split_seconds", "bounds", "communication_seconds")
"""Tables whose own names are those of the model's parts and of groups of ranks."""


def names_in(data: object) -> set[str]:
    """All names of the plain data, but those of tables by part."""
    if isinstance(data, list):
        return set().union(*map(names_in, data))
    if not isinstance(data, dict):
        return set()
    return set(data).union(*(names_in(value) for name, value in data.items() if name not in FREE_NAMES))


def test_the_stages_of_a_model_get_layouts_and_its_own_option_syntax() -> None:
    asked = ("--cluster", "1x1xA100-80GB", "--stages", "2b,2a", "2b:--train-iters=7")
    code, out, err = plan("aquila-vl-tiny", *asked)
    assert code == 0, err
    assert "3 layouts: 0 refused" in out and "aquila-vl-tiny/2b: the layout of aquila-vl-tiny/2a" in out
    assert "\n7 steps: " in out and "2c" not in out and "GPU-hours in all stages" in out
    code, out, err = plan("aquila-vl-tiny/2a", *asked[:4])
    assert code == 2 and "--stages" in err
    code, out, err = plan("infimm-tiny", *asked[:2], "pretrian:--train-iters=7")
    assert code == 2 and "did you mean pretrain?" in err


def test_scaling_cuts_the_model_further_and_ends_with_the_batch() -> None:
    code, out, err = plan(
        "infimm-tiny/pretrain", "--cluster", "1x8xA100-80GB", "--tensor-model-parallel-size", "2", "--scale"
    )
    assert code == 0, err
    lines = out[out.index("the same global batch on more GPUs") :].splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert {"8", "16", "32", "64", "4,096"} < set(rows)
    assert "TP 4, PP 4" in rows["64"] and "the recipe's batch (" in rows["4,096"]
    assert any(line.startswith("from ") and "the recipe's batch" in line for line in lines)


def test_prepared_data_take_the_place_of_assumptions(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    prepare_toy_data(tmp_path / "data", tmp_path / "tokenizer", samples={"pairs": 40, "documents": 1})
    asked = ("infimm-tiny/pretrain", "--cluster", "1x1xA100-80GB", "--micro-batch-size", "1", "--json")
    read_from = ("--data", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "tokenizer"))
    code, out, err = plan(*asked, *read_from)
    assert code == 0, err
    (found,) = json.loads(out)["stages"]
    pictures = len(toy_sample("documents", "train", 0, toy_world(0)).pictures)
    assert not found["assumed_of_data"] and "rows are those of prepared data" in found["assumptions"][0]
    assert found["images_per_second"] * found["step_seconds"] == pytest.approx(16 + 4 * pictures)
    code, out, err = plan(*asked)
    assert code == 0 and json.loads(out)["stages"][0]["assumed_of_data"], err


def test_data_that_a_stage_cannot_read_are_refused(tmp_path: Path) -> None:
    asked = ("--cluster", "1x1xA100-80GB", "--data", str(tmp_path))
    for name, said in (("decoder-tiny", "which reads toy text"), ("infimm-tiny/pretrain", "toy-pairs")):
        code, out, err = plan(name, *asked)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1, err


def test_a_run_that_does_not_fit_says_by_how_much(tmp_path: Path) -> None:
    cluster = tmp_path / "small.yaml"
    chip = "{name: A100-40GB, bf16_tflops: 312, fp32_tflops: 19.5, memory_gib: 0.1, memory_gb_s: 1555}"
    inside = "inside: {gb_s: 300, latency_us: 3, small_latency_us: 1}"
    between = "between: {gb_s: 25, latency_us: 9, small_latency_us: 3}"
    cluster.write_text(f"nodes: 1\ngpus_per_node: 1\nchip: {chip}\n{inside}\n{between}\n")
    page = tmp_path / "plan.html"
    more = ("--micro-batch-size", "4", "--scale", "--html", str(page))
    code, out, err = plan("decoder-tiny", "--cluster", str(cluster), *more)
    assert code == 2
    assert "the same global batch on more GPUs" in out and "decoder-tiny" in page.read_text()
    assert "it does not fit" in out and "a step takes" in out
    assert "megavlm: error: decoder-tiny on --cluster" in err and "GiB" in err


@pytest.mark.parametrize(
    "options",
    [
        ["--tensor-model-parallel-size", "3"],
        ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "3"],
        ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "2"],
    ],
)
def test_it_refuses_what_the_trainer_refuses(options: list[str]) -> None:
    with pytest.raises(LayoutError) as refused:
        check_for_world(parse_options(recipe("infimm-tiny/finetune"), options), 8)
    code, out, err = plan("infimm-tiny/finetune", "--cluster", "8xA100-80GB", *options)
    assert code == 2 and out == ""
    assert err.strip() == f"megavlm: error: {refused.value}"


def test_a_run_in_fp8_is_planned_where_the_chip_has_it() -> None:
    code, out, err = plan(
        "aquila-vl-tiny/2b", "--cluster", "1x1xH100", "--fp8-format", "hybrid", "--tensor-model-parallel-size", "1"
    )
    assert code == 0, err
    assert "of the FP8 peak" in out and "FP8, not modelled" in out
    code, out, err = plan("aquila-vl-tiny/2b", "--cluster", "1x1xA100-40GB", "--fp8-format", "hybrid")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "A100-40GB has compute capability 8.0; FP8 with the recipe delayed needs 8.9" in err


def test_a_page_without_a_place_is_refused_before_anything_is_traced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "absent" / "plan.html")
    assert cli.main(["plan", "decoder-tiny", "--cluster", "1x1xA100-80GB", "--html", place]) == 2
    assert "--html" in capsys.readouterr().err
