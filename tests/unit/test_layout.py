"""Degrees that fit and degrees that don't, with the nearest that do; what the schedules are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megavlm.batch import next_token_batch
from megavlm.build.run_config import check_for_world
from megavlm.errors import LayoutError
from megavlm.model.decoder.config import DecoderConfig
from megavlm.parallel.layout import ParallelConfig, check_layout, layout_fields, nearest_degrees
from megavlm.parallel.schedule import packed_rows
from megavlm.recipes import recipe


def decoder(**changes: int) -> DecoderConfig:
    shape: dict[str, Any] = {
        "num_layers": 28,
        "hidden_size": 1536,
        "ffn_hidden_size": 8960,
        "num_attention_heads": 12,
        "num_query_groups": 2,
        "kv_channels": 128,
        "vocab_size": 151_646,
    }
    return DecoderConfig(**{**shape, **changes})


@pytest.mark.parametrize(
    "tensor, pipeline, virtual, world", [(1, 1, 1, 1), (2, 7, 2, 28), (4, 1, 1, 8), (4, 4, 7, 16), (1, 28, 1, 28)]
)
def test_degrees_that_fit(tensor: int, pipeline: int, virtual: int, world: int) -> None:
    check_layout(parallel(tensor, pipeline, virtual), decoder(), world)


def parallel(tensor: int = 1, pipeline: int = 1, virtual: int = 1, layout: str | None = None) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_model_parallel_layout=layout,
    )


@pytest.mark.parametrize(
    "layout, shape, world, message",
    [
        (parallel(8), {}, 8, r"tensor_model_parallel_size = 8: does not divide 12 attention heads; use 4"),
        (parallel(3), {}, 3, r"= 3: neither divides 2 key-value heads nor is a multiple of them; use 2 or 4"),
        (parallel(4), {"ffn_hidden_size": 8962}, 4, r"= 4: does not divide the MLP width 8962; use 2"),
        (parallel(1, 3), {}, 3, r"pipeline_model_parallel_size = 3: 28 layers do not divide into 3 x 1 .* use 2 or 4"),
        (parallel(1, 4, 2), {}, 4, r"= 4: 28 layers do not divide into 4 x 2 equal chunks; use 2 or 7"),
        (parallel(2, 2), {}, 6, r"'2 x 2': 6 processes do not divide into groups of 4; start a multiple of 4"),
        (parallel(1, 2, 1, "Ettt|tL"), {"num_layers": 5}, 2, r"has 4 layers \(t\), the model has 5"),
        (parallel(1, 2, 1, "Ett|t|ttL"), {"num_layers": 5}, 2, r"has 3 chunks, stages x chunks a stage are 2"),
        (parallel(1, 2, 1, "tt|tttL"), {"num_layers": 5}, 2, r"must begin with its one E"),
        (parallel(1, 2, 1, "Ett|mttL"), {"num_layers": 5}, 2, r"knows only E, t, L and \|"),
    ],
)
def test_degrees_that_do_not_fit(layout: ParallelConfig, shape: dict[str, int], world: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_layout(layout, decoder(**shape), world)


def test_nearest_degrees() -> None:
    assert nearest_degrees(5, lambda degree: 12 % degree == 0) == [4, 6]
    assert nearest_degrees(8, lambda degree: 7 % degree == 0) == [7]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.global_batch_size": 12, "train.micro_batch_size": 8}, r"= 12: does not divide .* use 8 or 16"),
        ({"train.global_batch_size": 4}, r"gives 1 microbatches.*use a multiple of 8"),
    ],
)
def test_batches_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    run = recipe("decoder-tiny").with_changes(changes.items())
    if "train.micro_batch_size" not in changes:
        run = run.replace(parallel=parallel(1, 2, 2))
    world = run.parallel.model_parallel_size
    with pytest.raises(LayoutError, match=message):
        check_for_world(run, world)


def test_interleaved_schedules_never_batch_their_messages() -> None:
    """Over gloo with two stages the batched form mixes messages up without a word."""
    for backend in ("gloo", "nccl"):
        fields = layout_fields(parallel(1, 2, 2), torch.float32, backend)
        assert fields["overlap_p2p_comm"]
        assert not fields["batch_p2p_comm"]
    assert not layout_fields(parallel(1, 2), torch.float32, "gloo")["batch_p2p_comm"]
    assert layout_fields(parallel(1, 2), torch.float32, "nccl")["batch_p2p_comm"]


def test_outputs_are_kept_until_gloo_has_sent_them() -> None:
    """Freed after posting, the next stage now and then receives freed memory."""
    assert not layout_fields(parallel(1, 2, 2), torch.float32, "gloo")["deallocate_pipeline_outputs"]
    assert layout_fields(parallel(1, 2), torch.float32, "nccl")["deallocate_pipeline_outputs"]


def test_the_longest_document_never_the_row_sizes_the_rotary_table() -> None:
    starts = torch.tensor([0, 5, 13, 16], dtype=torch.int32)
    rows = packed_rows(next_token_batch(torch.zeros(1, 16, dtype=torch.int64), cu_seqlens=starts))
    assert rows is not None and rows.lengths == (5, 8, 3)
    assert rows.max_seqlen_q == rows.max_seqlen_kv == 8


def test_where_documents_begin_stays_on_the_host_and_is_sent_once() -> None:
    """A device is never asked how long they are: each answer would be waited for."""
    starts = torch.tensor([0, 5, 16], dtype=torch.int32)
    there = next_token_batch(torch.zeros(1, 16, dtype=torch.int64), cu_seqlens=starts).to(torch.device("meta"))
    assert there.tokens.is_meta and there.cu_seqlens is starts
    rows = packed_rows(there)
    assert rows is not None and rows.cu_seqlens_q.is_meta and rows.max_seqlen_q == 11
