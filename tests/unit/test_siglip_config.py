"""The SigLIP tower's settings: what they derive, what they refuse, how a config.json is read and written."""

from __future__ import annotations

from typing import Any

import pytest
from siglip_cases import TINY
from transformers import LlavaOnevisionConfig, SiglipVisionConfig

from megavlm.errors import ConfigError
from megavlm.model.towers.siglip_config import SIGLIP_SO400M, SiglipConfig

# google/siglip-so400m-patch14-384: what is no default of transformers
PUBLISHED = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


def test_the_published_config_less_a_block_is_the_tower_of_llava_onevision() -> None:
    assert SiglipConfig.from_hf(PUBLISHED, unused=1) == SIGLIP_SO400M
    assert SiglipConfig.from_hf(LlavaOnevisionConfig().vision_config.to_dict()) == SIGLIP_SO400M


def test_sizes_follow_from_the_settings() -> None:
    assert (SIGLIP_SO400M.grid, SIGLIP_SO400M.tokens, SIGLIP_SO400M.patch_values) == (27, 729, 588)
    assert TINY["an edge unseen"].grid == 2


@pytest.mark.parametrize("kind", TINY)
def test_a_config_goes_through_transformers_and_back(kind: str) -> None:
    config = TINY[kind]
    theirs = SiglipVisionConfig(**config.to_hf())
    assert SiglipConfig.from_hf(theirs.to_dict()) == config
    assert {key: getattr(theirs, key) for key in config.to_hf()} == config.to_hf()
    assert not theirs.vision_use_head


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 0}, "SiglipConfig.depth = 0: must be at least 1; use a positive number"),
        ({"image_size": 13}, "SiglipConfig.image_size = 13: holds no patch of 14 pixels; use 14 or more"),
        ({"heads": 7}, "SiglipConfig.heads = 7: does not divide width 1152; use a divisor of width"),
        ({"norm_epsilon": 0.0}, "SiglipConfig.norm_epsilon = 0.0: must be positive; use 1e-6"),
        ({"width": 1152.0}, "SiglipConfig.width = 1152.0: must be an integer"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SIGLIP_SO400M.replace(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": None}, "vision_config.hidden_size = None: must be a whole number; take a complete config"),
        ({"image_size": [384, 384]}, r"vision_config.image_size = \[384, 384\]: must be a whole number"),
        ({"num_hidden_layers": True}, "vision_config.num_hidden_layers = True: must be a whole number"),
        ({"layer_norm_eps": "1e-6"}, "norm_epsilon = '1e-6': must be a finite number"),
        ({"hidden_act": "gelu"}, "vision_config.hidden_act = 'gelu': only 'gelu_pytorch_tanh' is supported; take"),
        ({"model_type": "clip_vision_model"}, "model_type = 'clip_vision_model': only 'siglip_vision_model' is"),
        ({"attention_dropout": 0.1}, "vision_config.attention_dropout = 0.1: only 0.0 is supported"),
        ({"num_channels": 1}, "vision_config.num_channels = 1: only 3 is supported"),
        ({"num_hidden_layers": 1}, "SiglipConfig.depth = 0: must be at least 1"),
    ],
)
def test_configs_of_other_towers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SiglipConfig.from_hf({**PUBLISHED, **changes}, unused=1)
