"""config.json of Aquila-VL in both public layouts: read back as written, and refused where it says something else."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlavaOnevisionConfig

from megavlm.errors import ConfigError
from megavlm.model.aquila_vl.config import (
    AquilaVLConfig,
    aquila_vl_from_hf,
    is_aquila_vl,
    llava_next_config,
    transformers_config,
)
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.towers.siglip_config import SIGLIP_SO400M, SiglipConfig
from megavlm.tiles import STAGE_GRIDS, GridConfig

TOKENS = (151665, 151666)
TINY_TOWER = SiglipConfig(image_size=98, width=36, depth=2, heads=2, mlp_width=68)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"add_qkv_bias": True, "tied_embeddings": True, "norm_epsilon": 1e-6, "rotary_base": 1_000_000},
    "llama": {},
    "mistral": {"sliding_window": 4096},
}


def decoder(family: str = "qwen2") -> DecoderConfig:
    shape = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2}
    return DecoderConfig.from_dict(
        {"family": family, **shape, "kv_channels": 16, "vocab_size": 151936, "eos_token_ids": [5], **FAMILIES[family]}
    )


def parts(stage: str = "3", tower: SiglipConfig = SIGLIP_SO400M) -> AquilaVLConfig:
    grid = STAGE_GRIDS[stage].replace(tile_size=tower.image_size)
    return AquilaVLConfig(tower=tower, grid=grid, image_token_id=TOKENS[0], video_token_id=TOKENS[1])


def next_config(**changes: Any) -> dict[str, Any]:
    return {**llava_next_config(decoder(), parts(), "bfloat16"), **changes}


def hf_config(**changes: Any) -> dict[str, Any]:
    return {**transformers_config(decoder(), parts(), "bfloat16"), **changes}


@pytest.mark.parametrize("write", [transformers_config, llava_next_config])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGE_GRIDS)
def test_what_is_written_is_read_back(write: Any, family: str, stage: str) -> None:
    for tower in (SIGLIP_SO400M, TINY_TOWER):
        model = (decoder(family), parts(stage, tower))
        config = write(*model, "bfloat16")
        assert is_aquila_vl(config)
        read_decoder, read = aquila_vl_from_hf(config, tokens=TOKENS)
        grid = read.grid if stage != "1" else read.grid.replace(max_tiles_per_side=6, cap_tiles=9)
        assert (read_decoder, read.replace(grid=grid)) == model


def test_transformers_reads_what_we_write() -> None:
    config = LlavaOnevisionConfig.from_dict(transformers_config(decoder(), parts("2b"), "bfloat16"))
    assert (config.image_token_id, config.video_token_id) == TOKENS
    assert config.tie_word_embeddings and config.text_config.vocab_size == 151936
    assert config.vision_config.num_hidden_layers == 26 and not config.vision_config.vision_use_head
    assert config.vision_aspect_ratio == "anyres_max_5" and len(config.image_grid_pinpoints) == 9


def test_single_tiles_survive_transformers() -> None:
    config = LlavaOnevisionConfig.from_dict(transformers_config(decoder(), parts("1"), "bfloat16"))
    _, read = aquila_vl_from_hf(config.to_dict())
    assert read.grid.tiling == "single"


@pytest.mark.parametrize("side", [1, 3, 6])
def test_grids_as_a_list_and_in_words(side: int) -> None:
    listed = [[i * 384, j * 384] for i in range(1, side + 1) for j in range(1, side + 1)]
    for pinpoints in (listed, listed[::-1], f"(1x1),...,({side}x{side})"):
        _, read = aquila_vl_from_hf(next_config(image_grid_pinpoints=pinpoints), tokens=TOKENS)
        assert read.grid == GridConfig(max_tiles_per_side=side, cap_tiles=9)
    _, read = aquila_vl_from_hf(hf_config(image_grid_pinpoints=listed))
    assert read.grid.max_tiles_per_side == side


def test_the_number_in_llava_nexts_config_is_nobodys() -> None:
    """Its code never reads it, so released configs hold Qwen2's there, which in Qwen2.5 is another token."""
    _, read = aquila_vl_from_hf(next_config(image_token_index=151646), tokens=TOKENS)
    assert (read.image_token_id, read.video_token_id) == TOKENS
    with pytest.raises(ConfigError, match=r"token of <image> = 151646: the tokenizer says 151665; take both from one"):
        aquila_vl_from_hf(hf_config(image_token_index=151646), tokens=TOKENS)
    with pytest.raises(ConfigError, match=r"token of <video> = None: neither the config nor the tokenizer has one"):
        aquila_vl_from_hf(next_config(video_token_index=None))


HALF_GRID = [[384, 384], [384, 768]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf_config(image_grid_pinpoints=HALF_GRID), "is not every grid from"),
        (next_config(image_grid_pinpoints=HALF_GRID), "is not every grid from"),
        (next_config(image_grid_pinpoints="(1x1),...,(2x3)"), "is not every grid from"),
        (next_config(image_grid_pinpoints="(2x2),...,(3x3)"), "is no list of pairs"),
        (hf_config(image_grid_pinpoints=None), "image_grid_pinpoints = None: is no list of pairs"),
        (hf_config(image_grid_pinpoints=[[384, "x"]]), "is no list of pairs"),
        (hf_config(image_grid_pinpoints=[]), "is no list of pairs"),
        (hf_config(image_grid_pinpoints=[[384.5, 384]]), "is no list of pairs of pixels"),
        (hf_config(image_grid_pinpoints=[[float("inf"), 384]]), "is no list of pairs of pixels"),
        (hf_config(image_grid_pinpoints=[[384 * 10**6, 384]]), "is not every grid from"),
        (next_config(image_grid_pinpoints="(1x1),...,(1000000x1000000)"), "is not every grid from"),
        (hf_config(vision_aspect_ratio="anyres_max_" + "9" * 5000), "is no tiling with a cap"),
        (hf_config(model_type=["llava_onevision"], vision_config=None), "vision_config = None: is no section"),
        (hf_config(vision_aspect_ratio="pad"), "'pad': is no tiling with a cap"),
        (hf_config(vision_feature_layer=-2), "vision_feature_layer = -2: only -1 is supported"),
        (hf_config(vision_feature_select_strategy="default"), "'default': only 'full' is supported"),
        (hf_config(vision_config=None), "vision_config = None: is no section"),
        (hf_config(video_token_index=TOKENS[0]), "video_token_id = 151665: is the image's token, too"),
        (hf_config(image_token_index="<image>"), "is no token"),
        (next_config(mm_projector_type="linear"), "mm_projector_type = 'linear': only 'mlp2x_gelu' is supported"),
        (next_config(mm_use_im_start_end=True), "mm_use_im_start_end = True: only False is supported"),
        (next_config(mm_vision_tower="openai/clip-vit"), "mm_vision_tower = 'openai/clip-vit': is not known"),
        (next_config(mm_patch_merge_type="spatial"), "mm_patch_merge_type = 'spatial': is not supported"),
        (next_config(image_aspect_ratio="anyres"), "'anyres': is no tiling with a cap"),
        (next_config(model_type="llava_gemma"), "model_type = 'llava_gemma': is no decoder known here"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        aquila_vl_from_hf(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)
