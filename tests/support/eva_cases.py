"""Tiny EVA towers of every kind, and random weights for them under the released names."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import check_folder, load_weights
from megavlm.model.towers.eva import EvaTower
from megavlm.model.towers.eva_config import EvaConfig
from megavlm.model.towers.eva_state_map import INFIMM_PREFIX, eva_state_map

_L = EvaConfig(
    image_size=20,
    patch_size=4,
    width=24,
    depth=2,
    head_width=8,
    mlp_width=37,
    mlp="swiglu",
    sub_norm=True,
    rope=True,
    rope_pretrained_grid=3,
    post_norm=False,
    head_dim_out=10,
)
_G = _L.replace(mlp="gelu", sub_norm=False, rope=False, head_width=6)
TINY = {
    "L": _L,
    "g": _G,
    "E": _G.replace(post_norm=True),
    "gelu with sub-LN": _L.replace(mlp="gelu"),
    "post-norm swiglu": _L.replace(sub_norm=False, post_norm=True),
}
"""The three published kinds, and two that combine their switches in another way."""


def released_state(config: EvaConfig, prefix: str = INFIMM_PREFIX, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, biases far from zero; the rotary tables as well."""
    generator = torch.Generator().manual_seed(seed)
    state_map = eva_state_map(config, prefix)
    state = {}
    for name, shape in state_map.folder_shapes().items():
        values = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("weight")
        state[name] = (
            1 + 0.2 * values if is_norm else values * (0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)
        )
    return state | {name: table.clone() for name, table in state_map.constants.items()}


def loaded_tower(config: EvaConfig, state: dict[str, Tensor], folder: Path) -> EvaTower:
    """A tower that read these weights from a file, by way of the checks."""
    file = folder / "tower.pt"
    torch.save(state, file)
    tower = EvaTower(config)
    with HFFolder.open_file(file) as source:
        check_folder(source, eva_state_map(config), "tower.pt")
        load_weights([tower], source, eva_state_map(config), tensor_rank=0, tensor_size=1)
    return tower


def random_images(config: EvaConfig, count: int, seed: int = 1) -> Tensor:
    size = config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
