"""Aquila-VL equals transformers' LlavaOnevision: one image, several, none, a video, and all in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import every_layout
from tiny_aquila import GRIDS, save_tiny, tiny_config

from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import build_model
from megavlm.build.run_config import ParallelConfig, PrecisionConfig, check_for_world
from megavlm.infer.cases import check_cases, read_cases
from megavlm.infer.record import record_cases
from megavlm.infer.verify import table, verify
from megavlm.parallel import groups as process_groups
from megavlm.testing import spawn

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
    "DP=2": (2, {}),
}
CASES = ("image", "thin image", "several images", "text", "video", "mixed batch")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each grid, with the cases that transformers computed."""
    root = tmp_path_factory.mktemp("aquila")
    for number, (stage, grid) in enumerate(GRIDS.items()):
        save_tiny(root / stage, tiny_config(grid, tied=number % 2 == 0), seed=number)
        record_cases(run_from_folder(root / stage), root / f"{stage}.safetensors", seed=number)
    return root


def verify_recorded(root: str, stages: list[str], degrees: dict[str, Any]) -> None:
    world_size = process_groups.join()
    parallel = ParallelConfig(**degrees)
    groups = process_groups.start(parallel)
    for stage in stages:
        run = run_from_folder(f"{root}/{stage}").replace(
            parallel=parallel, precision=PrecisionConfig(params_dtype="float32"), make_vocab_size_divisible_by=7
        )
        run = run.replace(train=run.train.replace(global_batch_size=8))
        check_for_world(run, world_size)
        cases = read_cases(f"{root}/{stage}.safetensors")
        check_cases(cases, stage, run)
        deviations = verify(build_model(run, groups), run, groups, cases)
        assert all(deviation.is_fine for deviation in deviations), f"stage {stage}\n{table(deviations)}"
        compared = {(deviation.case, deviation.what) for deviation in deviations}
        gradients = {(name, f"gradient of {of}") for name, case in cases.items() for of in case.gradients}
        assert compared == {(name, what) for name in CASES for what in ("logits", "loss")} | gradients
        assert ("image", "gradient of vision_tower.vision_model.embeddings.patch_embedding.weight") in compared
        assert ("image", "gradient of image_newline") in compared


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_cases(layout: str, recorded: Path) -> None:
    world_size, degrees = LAYOUTS[layout]
    stages = list(GRIDS) if world_size == 1 else ["2b", "3"]
    spawn(verify_recorded, world_size, str(recorded), stages, degrees)


@pytest.mark.full
@pytest.mark.parametrize("layout", every_layout(), ids=lambda layout: layout[0])
def test_recorded_cases_in_every_layout(layout: tuple[str, int, dict[str, Any]], recorded: Path) -> None:
    _, world_size, degrees = layout
    spawn(verify_recorded, world_size, str(recorded), list(GRIDS), degrees)
