"""Aquila-VL's greedy text equals transformers': images, several images, a video and none, in one batch of ours."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_aquila import save_tiny, tiny_config
from torch import Tensor

from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import build_model
from megavlm.build.run_config import ParallelConfig, PrecisionConfig, RunConfig
from megavlm.infer.generate import generate
from megavlm.infer.prompt import Prompt
from megavlm.infer.record import random_rows
from megavlm.infer.sampling import SamplingConfig
from megavlm.infer.spliced_cases import read_media
from megavlm.parallel import groups as process_groups
from megavlm.testing import spawn

NEW = 12


def questions(run: RunConfig) -> list[dict[str, Tensor]]:
    draw = random.Random(5)
    rows: list[tuple[list[list[tuple[int, int]]], list[int]]] = [
        ([[(150, 230)]], [0]),
        ([[]], [0]),
        ([[(40, 90), (300, 20)]], [0]),
        ([[]], [2]),
        ([[(98, 98)]], [0]),
    ]
    torch.manual_seed(3)
    return [random_rows(run, draw, *row) for row in rows]


def ours(folder: str, degrees: dict[str, Any], questions: list[dict[str, Tensor]]) -> list[list[int]]:
    process_groups.join()
    run = run_from_folder(folder).replace(
        parallel=ParallelConfig(**degrees), precision=PrecisionConfig(params_dtype="float32")
    )
    assert run.aquila_vl is not None
    groups = process_groups.start(run.parallel)
    prompts = []
    for given in questions:
        media = read_media(given, 0, given["input_ids"], run.aquila_vl)
        tiles = sum(plan.tiles for plan in media.plans)
        prompts.append(Prompt(given["input_ids"][0], tiles, media.patches, tuple(media.plans)))
    settings = SamplingConfig(max_new_tokens=NEW, eos_token_ids=())
    together = generate(build_model(run, groups), run, groups, prompts, settings)
    alone = generate(build_model(run, groups), run, groups, prompts[:1], settings)
    assert together[:1] == alone
    return together


@pytest.mark.parametrize("degrees", [{}, {"tensor_model_parallel_size": 2}], ids=["one process", "TP=2"])
def test_greedy_text_is_transformers(degrees: dict[str, Any], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", tiny_config(), seed=7)
    given = questions(run_from_folder(tmp_path / "model"))
    expected = []
    for inputs in given:
        known = {n: t for n, t in inputs.items() if n not in ("labels", "batch_num_videos")}
        with torch.no_grad():
            answer = model.generate(**known, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(answer[0, inputs["input_ids"].size(1) :].tolist())
    assert len({tuple(answer) for answer in expected}) == len(expected), "the images make no difference"
    found = spawn(ours, ParallelConfig(**degrees).model_parallel_size, str(tmp_path / "model"), degrees, given)
    assert all(answers == expected for answers in found)
