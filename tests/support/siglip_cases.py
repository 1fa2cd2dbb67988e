"""Tiny SigLIP towers, the public models of the same shape with random weights, and ours filled from their files."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import check_folder, load_weights
from megavlm.model.towers.siglip import SiglipTower
from megavlm.model.towers.siglip_config import SiglipConfig
from megavlm.model.towers.siglip_state_map import find_siglip_prefix, is_unused, siglip_state_map
from megavlm.tiles import patch_rows

TINY = {
    "heads of 72": SiglipConfig(image_size=98, width=144, heads=2, depth=2, mlp_width=37),
    "an edge unseen": SiglipConfig(image_size=30, width=24, heads=3, depth=3, mlp_width=50),
    "another patch and epsilon": SiglipConfig(
        image_size=19, patch_size=4, width=20, heads=4, depth=1, mlp_width=16, norm_epsilon=0.1
    ),
}

WHOLE_MODEL = {
    "text_model.embeddings.token_embedding.weight": torch.ones(5, 4),
    "text_model.head.weight": torch.ones(4, 4),
    "logit_scale": torch.tensor([4.6]),
    "logit_bias": torch.tensor([-10.0]),
}
"""What a published folder holds beside its vision tower."""


def published(config: SiglipConfig, seed: int = 0) -> SiglipVisionModel:
    """transformers' model with a pooling head and one block more than is used; no bias zero, no norm one."""
    theirs = SiglipVisionConfig(
        **{**config.to_hf(), "num_hidden_layers": config.depth + 1, "vision_use_head": True},
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SiglipVisionModel(theirs).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:  # a product keeps the size of its input, so that float32 errors stay small beside 1
                    parameter.normal_(0.0, math.prod(parameter.shape[1:]) ** -0.5)
    return model


def read_tower(file: Path, config: SiglipConfig, tensor_rank: int = 0, tensor_size: int = 1) -> SiglipTower:
    """A tower that read its weights from a published file, by way of the checks, in the file's number format."""
    with HFFolder.open_file(file) as source:
        prefix = find_siglip_prefix(source.names(), file.name)
        state_map = siglip_state_map(config, prefix)
        check_folder(source, state_map, file.name, unused=partial(is_unused, prefix=prefix, depth=config.depth))
        tower = SiglipTower(config).to(source.dtype(prefix + "post_layernorm.weight"))
        load_weights([tower], source, state_map, tensor_rank, tensor_size)
    return tower


def tower_of(state: dict[str, Tensor], config: SiglipConfig, folder: Path) -> SiglipTower:
    """Ours with the weights of a public model's state."""
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return read_tower(folder / "model.safetensors", config)


def random_images(config: SiglipConfig, count: int, seed: int = 1) -> Tensor:
    size = config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def rows_of(images: Tensor, config: SiglipConfig) -> Tensor:
    """Patch rows without what the last incomplete patches would hold."""
    seen = config.grid * config.patch_size
    return patch_rows(images[:, :, :seen, :seen], config.patch_size)
