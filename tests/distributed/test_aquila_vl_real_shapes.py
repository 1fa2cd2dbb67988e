"""Aquila-VL-2B at full size, without memory: its counts, and one rank of stage 3 in fake tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_world import join_fake_world
from torch._subclasses.fake_tensor import FakeTensorMode

from megavlm.batch import AssembleTable, SplicedMedia, TextBatch
from megavlm.build.families import state_map_of
from megavlm.build.model import build_model
from megavlm.build.run_config import AquilaVLConfig, DecoderConfig, ParallelConfig, PrecisionConfig, RunConfig
from megavlm.data.assemble_tables import spliced_batch
from megavlm.model.freeze import PARTS_OF_AQUILA_VL, Part, count_parts
from megavlm.parallel import groups as process_groups
from megavlm.parallel.schedule import run_schedule
from megavlm.testing import spawn
from megavlm.tiles import STAGE_GRIDS, plan_image

QWEN = DecoderConfig(
    family="qwen2",
    num_layers=28,
    hidden_size=1536,
    ffn_hidden_size=8960,
    num_attention_heads=12,
    num_query_groups=2,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=32768,
    rotary_base=1_000_000,
    norm_epsilon=1e-6,
    add_qkv_bias=True,
    tied_embeddings=True,
)
TIED, SEPARATE = 1_945_595_424, 2_178_969_120
TOWER, PROJECTOR, NEWLINE, UNUSED_NORM = 397_747_744, 4_131_840, 1536, 2 * 1152
LENGTH = 12_288


def real_run(stage: str, tied: bool = True, trainable: tuple[Part, ...] | None = None, **parallel: Any) -> RunConfig:
    return RunConfig(
        name="aquila-vl-2b",
        decoder=QWEN.replace(tied_embeddings=tied),
        aquila_vl=AquilaVLConfig(grid=STAGE_GRIDS[stage], image_token_id=151665, video_token_id=151666),
        trainable=trainable or (("projector",) if stage == "1" else PARTS_OF_AQUILA_VL),
        parallel=ParallelConfig.from_dict(parallel),
        precision=PrecisionConfig(params_dtype="bfloat16"),
        make_vocab_size_divisible_by=64,
    )


def count_parameters(stage: str, tied: bool) -> tuple[int, dict[str, tuple[int, int]]]:
    join_fake_world(1)
    run = real_run(stage, tied)
    groups = process_groups.start(run.parallel)
    with FakeTensorMode():
        model = build_model(run, groups)
        everything = sum(parameter.numel() for part in model.parts() for parameter in part.parameters())
        return everything, {count.part: (count.parameters, count.trained) for count in count_parts(model.parts())}


@pytest.mark.parametrize(
    ("stage", "tied", "everything"), [("1", True, TIED), ("2a", True, TIED), ("3", False, SEPARATE)]
)
def test_parameter_counts(stage: str, tied: bool, everything: int) -> None:
    """Stage 1 trains the projector's 4.13M, all others the full 1.9B (the tower's last norm is used by nothing)."""
    ((found, parts),) = spawn(count_parameters, 1, stage, tied)
    assert found == everything
    full = stage != "1"
    decoder = everything - TOWER - PROJECTOR - NEWLINE
    assert parts == {
        "decoder": (decoder, full * decoder),
        "projector": (PROJECTOR, PROJECTOR),
        "newline": (NEWLINE, full * NEWLINE),
        "tower": (TOWER, full * (TOWER - UNUSED_NORM)),
    }
    shapes = state_map_of(real_run(stage, tied)).folder_shapes()
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == everything


def one_rank_of_stage_3(degrees: dict[str, Any]) -> dict[str, int]:
    """A row of 12,288 tokens with an image of ten tiles, 3 x 3 and the base, forward and backward."""
    join_fake_world(32)
    run = real_run("3", **degrees)
    assert run.aquila_vl is not None
    grid, size = run.aquila_vl.grid, run.aquila_vl.tower
    plan = plan_image(1100, 1000, "image", grid)
    assert plan.tiles == 10
    groups = process_groups.start(run.parallel)
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    is_image = np.zeros((1, LENGTH), bool)
    is_image[0, 20 : 20 + plan.tokens] = True
    patches = torch.zeros(plan.patch_rows, size.patch_values)
    batch = spliced_batch(tokens, tokens, is_image, [plan], patches)
    assert isinstance(batch.media, SplicedMedia) and batch.media.table.weight is None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    table = AssembleTable(mode.from_tensor(batch.media.table.index), None)
    batch = replace(batch, media=replace(batch.media, table=table))
    with mode:
        model = build_model(run, groups)

        def total(batch: TextBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            assert losses.shape == (1, LENGTH)
            return losses.sum(), torch.tensor(LENGTH, dtype=torch.int32), None

        for chunk in model.chunks:
            chunk.config.finalize_model_grads_func = None
        run_schedule(model.chunks, [batch], total, inputs=model.inputs)
        got = {n: tuple(p.grad.shape) for c in model.chunks for n, p in c.named_parameters() if p.grad is not None}
        wanted = {n: tuple(p.shape) for c in model.chunks for n, p in c.named_parameters() if p.requires_grad}
        assert got == wanted
        return {count.part: count.trained for count in count_parts(model.chunks)}


@pytest.mark.parametrize(
    "degrees",
    [{}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}],
    ids=["data parallel", "TP=2 with SP"],
)
def test_one_rank_of_stage_3_in_fake_tensors(degrees: dict[str, Any]) -> None:
    (parts,) = spawn(one_rank_of_stage_3, 1, degrees)
    assert parts["tower"] == TOWER - UNUSED_NORM and parts["projector"] == PROJECTOR
    whole = TIED - TOWER - PROJECTOR - NEWLINE
    # Norms are whole on every rank, all matrices and the biases of queries, keys and values are sliced.
    norms = (2 * 28 + 1) * 1536
    assert parts["decoder"] == (whole if not degrees else (whole - norms) // 2 + norms)
