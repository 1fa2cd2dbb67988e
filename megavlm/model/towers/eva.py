"""The EVA-CLIP vision tower: patch rows in, the last block's raw output out.

Letters of shapes: n images, t tokens of an image (the class token and its patches), D width, h heads, d head width.
Images never see each other, so any number of them runs in one call, zero included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megavlm.model.towers.eva_config import EvaConfig

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, each float32 [t, d]."""


class EvaTower(nn.Module):
    """One configurable tower for EVA02-CLIP-L, EVA01-CLIP-g and EVA02-CLIP-E."""

    def __init__(self, config: EvaConfig, recompute: bool = False) -> None:
        """`recompute`: keep only the input of each block for backward, and compute the rest again."""
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.patch_embedding = nn.Linear(config.patch_values, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.depth))
        # CLIP's way out, which the features here bypass. They are parameters because checkpoints hold them and must
        # get them back; they get no gradient, so nothing that waits for one may count them in.
        self.norm = nn.LayerNorm(config.width, config.norm_epsilon).requires_grad_(False)
        self.head = nn.Linear(config.width, config.head_dim_out).requires_grad_(False)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch rows [n * patches, 3 * patch_size**2] (see `megavlm.tiles`) -> [n, t, D], class token first."""
        config = self.config
        assert patches.size(0) % config.patches == 0, f"{patches.size(0)} rows make no whole images"
        x = self.patch_embedding(patches).view(-1, config.patches, config.width)
        x = torch.cat([self.class_token.expand(x.size(0), -1, -1), x], dim=1) + self.position_embedding
        # Made anew for each call: a buffer would be cast to bfloat16 with the weights, and lost on the meta device.
        rope = rope_with_class_token(config, patches.device) if config.rope else None
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope)
        return x


class EvaBlock(nn.Module):
    """Attention and MLP on a residual stream, their norms before (L, g) or behind them (E)."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.attention_norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.attention = EvaAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.mlp = SwigluMLP(config) if config.mlp == "swiglu" else GeluMLP(config)

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        """[n, t, D] -> [n, t, D]."""
        if self.post_norm:
            x = x + self.attention_norm(self.attention(x, rope))
            return x + self.mlp_norm(self.mlp(x))
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class EvaAttention(nn.Module):
    """Bidirectional attention within each image; queries and values have a bias, keys have none."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        self.sub_norm = nn.LayerNorm(config.width, config.norm_epsilon) if config.sub_norm else nn.Identity()
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        """[n, t, D] -> [n, t, D]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))  # [n, t, 3, h, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        # On GPUs the flash kernel of older torch refuses a batch of none (pytorch issue 165944).
        out = F.scaled_dot_product_attention(q, k, v) if x.size(0) else v
        return self.proj(self.sub_norm(out.transpose(1, 2).flatten(2)))


class SwigluMLP(nn.Module):
    """The MLP gated by SiLU."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.sub_norm = nn.LayerNorm(config.mlp_width, config.norm_epsilon) if config.sub_norm else nn.Identity()
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.sub_norm(F.silu(self.gate(x)) * self.up(x)))


class GeluMLP(nn.Module):
    """The plain MLP."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.sub_norm = nn.LayerNorm(config.mlp_width, config.norm_epsilon) if config.sub_norm else nn.Identity()
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.sub_norm(F.gelu(self.up(x))))


def rope_table(config: EvaConfig, device: torch.device | None = None) -> Rope:
    """Cosines and sines of the patches' rotary angles, each float32 [patches, d], patches row-major.

    The first half of a head's channels turns with the patch's row, the second with its column; neighbours in a pair
    turn together. The operations and their order are those of the public implementation: the bits are the same.
    """
    half = config.head_width // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    places = torch.arange(config.grid, dtype=torch.float32, device=device) / config.grid * config.rope_pretrained_grid
    angles = torch.outer(places, frequencies).repeat_interleave(2, dim=1)  # [grid, half]
    by_row = angles[:, None].expand(-1, config.grid, -1)
    by_column = angles[None].expand(config.grid, -1, -1)
    both = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    return both.cos(), both.sin()


def rope_with_class_token(config: EvaConfig, device: torch.device | None = None) -> Rope:
    """The table with a first row that turns nothing: the class token has no place in the image."""
    cos, sin = rope_table(config, device)
    return F.pad(cos, (0, 0, 1, 0), value=1.0), F.pad(sin, (0, 0, 1, 0), value=0.0)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn pairs of neighbouring channels of [n, h, t, d], in float32 whatever x is."""
    cos, sin = rope
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
