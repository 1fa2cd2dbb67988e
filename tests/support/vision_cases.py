"""A tiny trained tower and resampler, with what stands behind their features in each of the three gradient cases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from eva_cases import TINY
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.model.resampler import Resampler, ResamplerConfig
from megavlm.model.towers import mark_vision_parallel
from megavlm.model.towers.eva import EvaTower
from megavlm.parallel.groups import Groups
from megavlm.parallel.vision_parallel import Deal, Gradient, encode_dealt, rows_of_images

TOWER = TINY["L"].replace(image_size=8, depth=1)
RESAMPLER = ResamplerConfig(width=TOWER.width, depth=1, num_latents=4, heads=2, head_width=8)
PROJECTED = 8

CASES: dict[str, Gradient] = {
    "replicated": "replicated",
    "own slice": "partial",
    "column-parallel": "replicated",
    "column-parallel, sum left to us": "partial",
    "column-parallel under sequence parallel": "partial",
}
"""What becomes of the features -> the rule of their gradient."""


def vision(seed: int = 3) -> nn.Sequential:
    """Patch rows -> latents, every parameter random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(EvaTower(TOWER), Resampler(RESAMPLER))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def projection() -> Tensor:
    """Weight of the column-parallel projection, whole."""
    return torch.randn(PROJECTED, TOWER.width, generator=torch.Generator().manual_seed(4)) * 0.3


def patches_of(images: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images * TOWER.patches, TOWER.patch_values, generator=generator)


def directions(images: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(images * RESAMPLER.num_latents, 1, width, generator=generator)


def loss_of_one_process(case: str, model: nn.Module, weight: Tensor, images: int, seed: int) -> Tensor:
    """The loss of these images without any parallelism."""
    rows = model(patches_of(images, seed)).flatten(0, 1)[:, None]
    if case.startswith("column"):
        rows = F.linear(rows, weight)
    return (rows.tanh() * directions(images, rows.size(-1), seed)).sum()


class DealtVision(MegatronModule):
    """The tower and resampler dealt over tensor-parallel ranks, and one case's use of their features."""

    def __init__(self, case: str, groups: Groups) -> None:
        tp = groups.collection.tp
        sequence_parallel = "sequence parallel" in case
        config = TransformerConfig(
            num_layers=1,
            hidden_size=TOWER.width,
            num_attention_heads=tp.size(),
            tensor_model_parallel_size=tp.size(),
            sequence_parallel=sequence_parallel,
            calculate_per_token_loss=True,
            perform_initialization=False,
        )
        super().__init__(config)
        self.case, self.group = case, tp
        self.vision = vision()
        mark_vision_parallel(self.vision)
        if case.startswith("column"):
            self.projection = ColumnParallelLinear(
                TOWER.width,
                PROJECTED,
                config=config,
                init_method=nn.init.zeros_,
                bias=False,
                disable_grad_reduce="left to us" in case,
                tp_group=tp,
            )
            self.projection.weight.data.copy_(self.own_columns(projection().T).T)

    def forward(self, deal: Deal, seed: int) -> Tensor:
        """This rank's loss of a microbatch's images."""
        images = sum(map(len, deal))
        own = rows_of_images(patches_of(images, seed), TOWER.patches, deal[self.group.rank()])
        latents = encode_dealt(self.vision, own, TOWER.patches, deal, self.group, CASES[self.case])
        rows = latents.flatten(0, 1)[:, None]  # as decoders have them: [rows, batch, width]
        if self.case == "own slice" or self.config.sequence_parallel:
            rows = self.own_rows(rows)
        if self.case.startswith("column"):
            rows, _ = self.projection(rows)
            return (rows.tanh() * self.own_columns(directions(images, PROJECTED, seed))).sum()
        wanted = directions(images, TOWER.width, seed)
        return (rows.tanh() * (self.own_rows(wanted) if self.case == "own slice" else wanted)).sum()

    def own_rows(self, rows: Tensor) -> Tensor:
        return rows.tensor_split(self.group.size())[self.group.rank()]

    def own_columns(self, rows: Tensor) -> Tensor:
        return rows.tensor_split(self.group.size(), dim=-1)[self.group.rank()]
