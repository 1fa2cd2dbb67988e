"""`megavlm plan` from its arguments: what it prints, and what it refuses in the trainer's own words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megavlm.build.run_config import check_for_world
from megavlm.errors import LayoutError
from megavlm.options import parse_options
from megavlm.recipes import recipe


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "megavlm", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_stage_in_a_given_layout() -> None:
    done = plan("infimm-tiny/pretrain", "--cluster", "1x2xA100-80GB", "--tensor-model-parallel-size", "2", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["fits"] and found["gpus"] == 2 and found["layout"].startswith("TP 2")
    assert sum(found["split_seconds"].values()) == pytest.approx(found["step_seconds"])
    assert found["hours"] == pytest.approx(found["steps"] * found["step_seconds"] / 3600)
    (stage,) = found["stages"]
    assert stage["worst"]["images"] >= stage["mean"]["images"] > 0
    memory = stage["mean"]["memory"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")


def test_a_run_that_does_not_fit_says_by_how_much(tmp_path: Path) -> None:
    cluster = tmp_path / "small.yaml"
    chip = "{name: A100-40GB, bf16_tflops: 312, memory_gib: 0.1, memory_gb_s: 1555}"
    inside = "inside: {gb_s: 300, latency_us: 3, small_latency_us: 1}"
    between = "between: {gb_s: 25, latency_us: 9, small_latency_us: 3}"
    cluster.write_text(f"nodes: 1\ngpus_per_node: 1\nchip: {chip}\n{inside}\n{between}\n")
    done = plan("decoder-tiny", "--cluster", str(cluster), "--micro-batch-size", "4")
    assert done.returncode == 2
    assert "it does not fit" in done.stdout and "a step takes" in done.stdout
    assert done.stderr.count("\n") == 1 and "GiB" in done.stderr and "Traceback" not in done.stderr


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
    done = plan("infimm-tiny/finetune", "--cluster", "8xA100-80GB", *options)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == f"megavlm: error: {refused.value}"
