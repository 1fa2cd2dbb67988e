"""InfiMM equals the public implementation: the golden cases under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import every_layout

from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import build_model
from megavlm.build.run_config import ParallelConfig, PrecisionConfig, check_for_world
from megavlm.infer.cases import read_cases
from megavlm.infer.verify import table, verify
from megavlm.parallel import groups as process_groups
from megavlm.testing import spawn

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP=2": (2, {"tensor_model_parallel_size": 2}),
    "TP=2 with sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP=2": (2, {"pipeline_model_parallel_size": 2}),
    "interleaved PP=2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "TP=2 x PP=2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "TP=2 x PP=2 with sequence parallel": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "TP=2 x PP=2, all stages encoding": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "vision_over": "all_stages"},
    ),
    "interleaved PP=2, all stages encoding": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "vision_over": "all_stages",
        },
    ),
    "DP=2": (2, {}),
}


def verify_golden(degrees: dict[str, Any]) -> None:
    world_size = process_groups.join()
    run = run_from_folder(GOLDEN).replace(
        parallel=ParallelConfig(**degrees),
        precision=PrecisionConfig(params_dtype="float32"),
        make_vocab_size_divisible_by=3,
    )
    run = run.replace(train=run.train.replace(global_batch_size=8))
    check_for_world(run, world_size)
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    cases = read_cases(GOLDEN / "cases.safetensors")
    deviations = verify(model, run, groups, cases)
    assert all(deviation.is_fine for deviation in deviations), "\n" + table(deviations)
    compared = {deviation.what for deviation in deviations if deviation.case == "training_step"}
    assert compared == {"logits", "loss", *(f"gradient of {name}" for name in cases["training_step"].gradients)}
    assert len(deviations) == 3 + len(compared)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_cases(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    spawn(verify_golden, world_size, degrees)


@pytest.mark.full
@pytest.mark.parametrize("vision_over", ["first_stage", "all_stages"])
@pytest.mark.parametrize("layout", every_layout(), ids=lambda layout: layout[0])
def test_golden_cases_in_every_layout(layout: tuple[str, int, dict[str, Any]], vision_over: str) -> None:
    _, world_size, degrees = layout
    spawn(verify_golden, world_size, {**degrees, "vision_over": vision_over})
