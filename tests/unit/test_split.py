"""Layers cut into chunks of equal cost: the best cut there is, which knows what frozen and visual parts cost."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from megavlm.build.costs import balanced_layout, row_costs
from megavlm.build.run_config import (
    AquilaVLConfig,
    DecoderConfig,
    InfiMMConfig,
    ParallelConfig,
    RunConfig,
    check_degrees,
)
from megavlm.errors import LayoutError
from megavlm.model.cross_attention import CrossAttentionConfig
from megavlm.model.freeze import PARTS_OF_AQUILA_VL, Part
from megavlm.model.resampler import ResamplerConfig
from megavlm.model.towers.eva_config import eva_tower
from megavlm.parallel.split import as_layout, balanced_split
from megavlm.recipes import recipe


def costliest(costs: list[float], split: list[int], before: float, behind: float) -> float:
    sums, first = [], 0
    for layers in split:
        sums.append(sum(costs[first : first + layers]))
        first += layers
    sums[0] += before
    sums[-1] += behind
    return max(sums)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_is_better(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.uniform(1, 5) for _ in range(draw.randint(4, 9))]
    chunks, before, behind = draw.randint(2, 4), draw.uniform(0, 8), draw.uniform(0, 8)
    mine = balanced_split(costs, chunks, before, behind)
    assert sum(mine) == len(costs)
    every = [
        [b - a for a, b in itertools.pairwise((0, *cuts, len(costs)))]
        for cuts in itertools.combinations_with_replacement(range(len(costs) + 1), chunks - 1)
    ]
    allowed = [split for split in every if all(layers > 0 for layers in split[1:-1])]
    best = min(costliest(costs, split, before, behind) for split in allowed)
    assert costliest(costs, mine, before, behind) == pytest.approx(best)


def test_letters() -> None:
    assert as_layout([1, 3]) == "Et|tttL"
    assert as_layout([0, 4]) == "E|ttttL"


def infimm_llama(**changes: object) -> RunConfig:
    base = recipe("decoder-tiny")
    tower = eva_tower("EVA01-CLIP-g/14-224")
    decoder = base.decoder.replace(
        num_layers=40,
        hidden_size=5120,
        ffn_hidden_size=13824,
        num_attention_heads=40,
        num_query_groups=40,
        kv_channels=128,
        vocab_size=32002,
        max_position_embeddings=4096,
    )
    parts = InfiMMConfig(
        model_type="infimm-llama",
        tower=tower,
        resampler=ResamplerConfig(width=tower.width),
        cross_attention=CrossAttentionConfig(every_n_layers=4),
    )
    run = base.replace(
        decoder=decoder,
        infimm=parts,
        train=base.train.replace(seq_length=384),
        parallel=ParallelConfig(pipeline_model_parallel_size=4),
    )
    return run.replace(**changes)


def test_images_take_layers_from_the_first_stage() -> None:
    run = infimm_llama(trainable=("cross_attention", "resampler"))
    few, many = (balanced_layout(run, images).split("|")[0].count("t") for images in (0.1, 6.0))
    assert many < few
    ahead = run.replace(parallel=run.parallel.replace(vision_over="all_stages"))
    assert balanced_layout(ahead, 6.0).split("|")[0].count("t") > many


def aquila_vl(trainable: tuple[Part, ...], **parallel: Any) -> RunConfig:
    """Aquila-VL-2B's shape."""
    decoder = DecoderConfig(
        family="qwen2",
        num_layers=28,
        hidden_size=1536,
        ffn_hidden_size=8960,
        num_attention_heads=12,
        num_query_groups=2,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=32768,
        add_qkv_bias=True,
        tied_embeddings=True,
    )
    base = recipe("decoder-tiny")
    return base.replace(
        decoder=decoder,
        aquila_vl=AquilaVLConfig(image_token_id=151665, video_token_id=151666),
        train=base.train.replace(seq_length=12288),
        trainable=trainable,
        parallel=ParallelConfig(pipeline_model_parallel_size=2, **parallel),
    )


def test_tiles_are_weighed_by_what_is_done_with_them() -> None:
    """A trained tower costs three times a frozen one, which all stages together take off the first."""
    projector: tuple[Part, ...] = ("projector",)
    everything = PARTS_OF_AQUILA_VL
    trained, frozen, ahead = (
        row_costs(run, 10.0).before
        for run in (aquila_vl(everything), aquila_vl(projector), aquila_vl(projector, vision_over="all_stages"))
    )
    # Of ten tiles: 397 million parameters over 729 tokens, two operations each; and 26 layers of attention.
    assert frozen - ahead == pytest.approx(10 * (2 * 397e6 * 729 + 26 * 4 * 729**2 * 1152), rel=0.01)
    # But for the gradient of the pixels, which nobody asks for, and the projector's work, which is little.
    assert trained - ahead == pytest.approx(3 * (frozen - ahead), rel=0.02) and 0 < ahead < 0.1 * frozen
    assert row_costs(aquila_vl(everything), 20.0).before == 2 * trained
    few, many = (balanced_layout(aquila_vl(everything), tiles).split("|")[0].count("t") for tiles in (0.0, 20.0))
    assert many < few


def test_frozen_parts_cost_less() -> None:
    trained, frozen = (row_costs(infimm_llama(trainable=t), 1.0) for t in (("decoder",), ("resampler",)))
    # Nothing that learns stands in front of the first gated block, before layer 4.
    shares = [frozen.layers[layer] / trained.layers[layer] for layer in (0, 2, 4)]
    assert shares[:2] == pytest.approx([1 / 3, 1 / 3])
    assert shares[2] == pytest.approx(2 / 3, rel=0.01)  # attention costs what it costs where all learns
    assert frozen.behind == pytest.approx(trained.behind * 2 / 3)


def test_a_layer_with_a_gated_block_costs_more() -> None:
    costs = row_costs(infimm_llama(), 1.0).layers
    assert len(costs) == 40
    assert [number for number, cost in enumerate(costs, 1) if cost > min(costs)] == list(range(4, 41, 4))


def test_degrees_that_do_not_divide_the_gated_heads_are_refused() -> None:
    run = infimm_llama(parallel=ParallelConfig(tensor_model_parallel_size=4))
    assert run.infimm is not None
    check_degrees(run, 4)
    six_heads = run.infimm.replace(cross_attention=run.infimm.cross_attention.replace(heads=6))
    with pytest.raises(LayoutError, match="= 4: does not divide the 6 heads of the gated cross-attention; use 3 or 6"):
        check_degrees(run.replace(infimm=six_heads), 4)
