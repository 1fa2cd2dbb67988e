"""Tiny random LlavaOnevision models as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from megavlm.tiles import GridConfig

TILE = 98
IMAGE, VIDEO = 100, 101
GRIDS = {
    "2a": GridConfig(tile_size=TILE, max_tiles_per_side=2, cap_tiles=4),
    "2b": GridConfig(tile_size=TILE, max_tiles_per_side=3, cap_tiles=5),
    "2c": GridConfig(tile_size=TILE, max_tiles_per_side=4, cap_tiles=6),
    "3": GridConfig(tile_size=TILE, max_tiles_per_side=6, cap_tiles=9),
}
"""The grids of the stages, over tiles of 7x7 tokens."""


def tiny_config(
    grid: GridConfig = GRIDS["2b"], *, tied: bool = True, text: dict[str, Any] | None = None
) -> LlavaOnevisionConfig:
    """Four decoder layers, two of the tower, heads of 18; all sizes different where they can be."""
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 36,
            "intermediate_size": 68,
            "patch_size": 14,
            "image_size": TILE,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 120,
            "max_position_embeddings": 4096,
            "initializer_range": 0.1,
            "tie_word_embeddings": tied,
            **(text or {}),
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        tie_word_embeddings=tied,
        image_grid_pinpoints=[list(resolution) for resolution in grid.resolutions],
        vision_aspect_ratio=f"anyres_max_{grid.cap_tiles}",
    )


def save_tiny(
    folder: Path, config: LlavaOnevisionConfig | None = None, seed: int = 0
) -> LlavaOnevisionForConditionalGeneration:
    """A model with random weights, none of them at a value that hides mistakes."""
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config or tiny_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "vision_tower" in name or "projector" in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return model
