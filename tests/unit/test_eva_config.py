"""The EVA towers' settings: what they derive, what they refuse, how a released config.json is read."""

from __future__ import annotations

from typing import Any

import pytest
from eva_cases import TINY

from megavlm.errors import ConfigError
from megavlm.model.towers.eva_config import EVA_TOWERS, EvaConfig, eva_tower

LARGE = {
    "image_size": 336,
    "layers": 24,
    "width": 1024,
    "head_width": 64,
    "patch_size": 14,
    "mlp_ratio": 2.6667,
    "eva_model_name": "eva-clip-l-14-336",
    "drop_path_rate": 0.0,
    "xattn": False,
    "fusedLN": True,
    "rope": True,
    "pt_hw_seq_len": 16,
    "intp_freq": True,
    "naiveswiglu": True,
    "subln": True,
    "embed_dim": 768,
}
_SAME = {"image_size": 224, "patch_size": 14, "xattn": False, "fusedLN": True, "embed_dim": 1024}
GIANT = {**_SAME, "layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637}
ENORMOUS = {
    **_SAME,
    "layers": 64,
    "width": 1792,
    "head_width": 112,
    "mlp_ratio": 8.571428571428571,
    "postnorm": True,
}


@pytest.mark.parametrize(
    "name, visual", [("EVA02-CLIP-L/14-336", LARGE), ("EVA01-CLIP-g/14-224", GIANT), ("EVA02-CLIP-E/14-224", ENORMOUS)]
)
def test_released_configs_are_the_published_towers(name: str, visual: dict[str, Any]) -> None:
    assert EvaConfig.from_hf(visual) == eva_tower(name)


def test_sizes_follow_from_the_settings() -> None:
    config = EVA_TOWERS["EVA02-CLIP-L/14-336"]
    assert (config.grid, config.patches, config.tokens) == (24, 576, 577)
    assert (config.heads, config.patch_values) == (16, 588)


def test_an_unknown_tower_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        eva_tower("EVA-02-G")
    assert "'EVA-02-G': is not known; use one of" in str(caught.value)
    assert all(name in str(caught.value) for name in EVA_TOWERS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 0}, "EvaConfig.width = 0: must be at least 1; use a positive number"),
        ({"image_size": 22}, "EvaConfig.image_size = 22: is no multiple of patch_size 4; use 20"),
        ({"head_width": 7}, "EvaConfig.head_width = 7: does not divide width 24; use a divisor of width"),
        ({"head_width": 6}, "EvaConfig.head_width = 6: rotary positions turn pairs .*; use a multiple of 4"),
        ({"rope_pretrained_grid": 0}, "EvaConfig.rope_pretrained_grid = 0: must be at least 1; use 16"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TINY["L"].replace(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": None}, "config.json: visual.width = None: must be a number; take a complete config.json"),
        ({"mlp_ratio": "2"}, "config.json: visual.mlp_ratio = '2': must be a number"),
        ({"intp_freq": False}, "config.json: visual.intp_freq = False: only True is supported; take a tower"),
        ({"ls_init_value": 0.1}, "config.json: visual.ls_init_value = 0.1: only None is supported; take a tower"),
        ({"qkv_bias": False}, "config.json: visual.qkv_bias = False: only True is supported; take a tower"),
        ({"rope": "yes"}, "EvaConfig.rope = 'yes': must be true or false"),
    ],
)
def test_configs_of_other_towers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaConfig.from_hf({**LARGE, **changes})
