"""A small tower that learns to see the toy world from labels of every patch: toy supervision, no CLIP.

InfiMM's EVA is read behind a plain LayerNorm, and pictures as a whole by its class token. Aquila-VL's SigLIP has no
such token, and no norm before the projector: it is read as it is, and pictures by the mean of their patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavlm.data.tile_images import MEAN as SIGLIP_MEAN
from megavlm.data.tile_images import STD as SIGLIP_STD
from megavlm.model.towers.eva import EvaTower
from megavlm.model.towers.eva_config import EvaConfig
from megavlm.model.towers.siglip import SiglipTower
from megavlm.model.towers.siglip_config import SiglipConfig
from megavlm.tiles import patch_rows
from megavlm.toy.seen import NOT_ASKED, PATCH_CLASSES, PICTURE_CLASSES, Seen

_PATCH_WEIGHTS = {"colour": 1.0, "shape": 1.0, "character": 2.0, "row": 0.5, "column": 0.5, "order": 1.0, "value": 0.5}
_PLACE_WEIGHT = 0.25
"""Of each patch's own row and column in the picture: without a strong code of places no later layer can point."""
_THINGS_WEIGHT, _COUNT_WEIGHT = 1.0, 0.15
_BACKGROUND = 0.3
"""What all patches without a thing weigh, against those with one: these are few."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's."""

Tower = EvaTower | SiglipTower
TowerConfig = EvaConfig | SiglipConfig


class Heads(nn.Module):
    """Linear readings of a tower's features: what the tower learns and is judged by."""

    def __init__(self, width: int, grid: int) -> None:
        """`grid`: patches along each side."""
        super().__init__()
        self.grid = grid
        self.patches = nn.Linear(width, sum(PATCH_CLASSES.values()) + 2 * grid)
        self.pictures = nn.Linear(width, sum(PICTURE_CLASSES.values()))

    def forward(self, patches: Tensor, pictures: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features [n, patches, D] and [n, D] -> by name the scores of patches [n * patches, C], of pictures [n, C]."""
        of_patches = self.patches(patches.flatten(0, 1))
        names = {**PATCH_CLASSES, "patch row": self.grid, "patch column": self.grid}
        of_pictures = self.pictures(pictures).split(list(PICTURE_CLASSES.values()), dim=1)
        return (
            dict(zip(names, of_patches.split(list(names.values()), dim=1), strict=True)),
            dict(zip(PICTURE_CLASSES, of_pictures, strict=True)),
        )


@dataclass(frozen=True)
class Labelled:
    """Pictures as the tower takes them, and their labels."""

    pixels: Tensor
    """[n, height, width, 3], uint8."""
    of_patches: Tensor
    """[n * patches, PATCH_CLASSES], int64."""
    of_pictures: Tensor
    """[n, PICTURE_CLASSES], int64."""


def labelled(seen: Seen, which: Tensor | None = None) -> Labelled:
    """These pictures of all, or all."""
    arrays = [torch.from_numpy(array) for array in seen]
    pixels, of_patches, of_pictures = arrays if which is None else (array[which] for array in arrays)
    return Labelled(pixels, of_patches.long().flatten(0, 1), of_pictures.long())


def normalised_patches(tower: Tower, pixels: Tensor) -> Tensor:
    """[n, height, width, 3] uint8 -> [n * patches, 3 * patch_size**2], normalised as the tower's data are."""
    mean, std = (torch.tensor(MEAN), torch.tensor(STD)) if isinstance(tower, EvaTower) else (SIGLIP_MEAN, SIGLIP_STD)
    return patch_rows(((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2), tower.config.patch_size)


def tower_features(tower: Tower, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """[n, height, width, 3] uint8 -> what is read of patches [n, patches, D] and of pictures as a whole [n, D]."""
    features = tower(normalised_patches(tower, pixels))
    if isinstance(tower, SiglipTower):
        return features, features.mean(1)
    features = F.layer_norm(features, features.shape[-1:])
    return features[:, 1:], features[:, 0]


def tower_loss(tower: Tower, heads: Heads, pictures: Labelled) -> Tensor:
    """How far the readings are from the labels."""
    of_patches, of_pictures = heads(*tower_features(tower, pictures.pixels))
    total = torch.zeros(())
    for number, (name, weight) in enumerate(_PATCH_WEIGHTS.items()):
        label = pictures.of_patches[:, number]
        each = F.cross_entropy(of_patches[name], label, reduction="none")
        is_thing = (label > 0).float()
        of_things = (each * is_thing).sum() / is_thing.sum().clamp(min=1)
        of_rest = (each * (1 - is_thing)).sum() / (1 - is_thing).sum().clamp(min=1)
        total = total + weight * (of_things + _BACKGROUND * of_rest)
    place = torch.arange(heads.grid**2).repeat(len(pictures.pixels))
    total = total + _PLACE_WEIGHT * F.cross_entropy(of_patches["patch row"], place // heads.grid)
    total = total + _PLACE_WEIGHT * F.cross_entropy(of_patches["patch column"], place % heads.grid)
    for number, (name, scores) in enumerate(of_pictures.items()):
        weight = _THINGS_WEIGHT if name == "things" else _COUNT_WEIGHT
        label = pictures.of_pictures[:, number]
        total = total + weight * F.cross_entropy(scores, label, ignore_index=NOT_ASKED)
    return total


@torch.no_grad()
def tower_accuracy(tower: Tower, heads: Heads, pictures: Labelled) -> dict[str, float]:
    """How often each reading is right, of the patches that show a thing and of the pictures."""
    of_patches, of_pictures = heads(*tower_features(tower, pictures.pixels))
    found = {}
    for number, name in enumerate(PATCH_CLASSES):
        label = pictures.of_patches[:, number]
        found[name] = float((of_patches[name].argmax(1) == label)[label > 0].float().mean())
    for number, name in enumerate(PICTURE_CLASSES):
        label = pictures.of_pictures[:, number]
        found[name] = float((of_pictures[name].argmax(1) == label)[label != NOT_ASKED].float().mean())
    return {name: share for name, share in found.items() if not math.isnan(share)}  # what no picture was asked for


def fresh_tower(config: TowerConfig, seed: int) -> Tower:
    """With weights to learn from."""
    torch.manual_seed(seed)
    tower = EvaTower(config) if isinstance(config, EvaConfig) else SiglipTower(config)
    for name, parameter in tower.named_parameters():
        if name.startswith("blocks") and parameter.dim() == 2:
            is_last = "proj" in name or "down" in name
            nn.init.normal_(parameter, std=(config.width * (2 * config.depth if is_last else 1)) ** -0.5)
    nn.init.normal_(tower.position_embedding, std=0.2)
    if isinstance(tower, EvaTower):
        nn.init.normal_(tower.class_token, std=0.2)
    return tower


def train_tower(
    config: TowerConfig,
    seen: Seen,
    steps: int,
    *,
    batch: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    after_step: Callable[[int, float, Tower, Heads], None] | None = None,
) -> tuple[Tower, Heads]:
    """A tower that sees, and the readings that show it."""
    tower = fresh_tower(config, seed)
    heads = Heads(config.width, config.image_size // config.patch_size)
    learning = [p for p in (*tower.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        loss = tower_loss(tower, heads, labelled(seen, torch.randint(len(seen.pixels), (batch,))))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if after_step is not None:
            after_step(step + 1, loss.item(), tower, heads)
    return tower, heads
