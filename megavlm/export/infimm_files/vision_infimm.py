"""From pixels to latents: the EVA-CLIP towers of the three InfiMM models, and the perceiver resampler.

Modules are named as in the released weights. Letters of shapes: n images, t tokens of an image (class token and
patches), l latents of an image, D the tower's width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOWER_NORM_EPSILON = 1e-6


class EvaTower(nn.Module):
    """EVA02-CLIP-L (rotary, sub-LN, SwiGLU), EVA01-CLIP-g (plain) or EVA02-CLIP-E (norms behind the branches).

    `visual` holds EVA-CLIP's own settings. `norm` and `head` belong to CLIP and are not used: the features are what
    the last block leaves, class token included.
    """

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        self.visual = visual
        width, patch = visual["width"], visual["patch_size"]
        self.grid = visual["image_size"] // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        self.patch_embed = PatchEmbedding(width, patch)
        self.blocks = nn.ModuleList(EvaBlock(visual) for _ in range(visual["layers"]))
        self.norm = nn.LayerNorm(width, TOWER_NORM_EPSILON)
        self.head = nn.Linear(width, visual["embed_dim"])

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 3, size, size] -> [n, t, D]."""
        patches = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        rope = self.rope_table(pixels.device) if self.visual.get("rope") else None
        for block in self.blocks:
            x = block(x, rope)
        return x

    def rope_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines in float32, each [t, head width]; the class token is not turned.

        Made anew for each call: the tables of a released file are rounded to the weights' precision.
        """
        half = self.visual["head_width"] // 2
        frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
        places = torch.arange(self.grid, dtype=torch.float32, device=device) / self.grid
        # Positions are those of the grid on which the frequencies were trained.
        angles = torch.outer(places * self.visual.get("pt_hw_seq_len", 16), frequencies).repeat_interleave(2, dim=1)
        by_row = angles[:, None].expand(-1, self.grid, -1)
        by_column = angles[None].expand(self.grid, -1, -1)
        angles = F.pad(torch.cat([by_row, by_column], dim=-1).flatten(0, 1), (0, 0, 1, 0))
        return angles.cos(), angles.sin()


class PatchEmbedding(nn.Module):
    """A token for each patch, row by row."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class EvaBlock(nn.Module):
    """Attention and MLP on a residual stream."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width = visual["width"]
        self.postnorm = visual.get("postnorm", False)
        self.norm1 = nn.LayerNorm(width, TOWER_NORM_EPSILON)
        self.attn = EvaAttention(visual)
        self.norm2 = nn.LayerNorm(width, TOWER_NORM_EPSILON)
        self.mlp = (SwigluMLP if visual.get("naiveswiglu") else GeluMLP)(
            width, int(width * visual["mlp_ratio"]), visual.get("subln", False)
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.postnorm:
            x = x + self.norm1(self.attn(x, rope))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class EvaAttention(nn.Module):
    """Attention within an image; queries and values have a bias, keys have none."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width = visual["width"]
        self.heads = width // visual["head_width"]
        self.subln = visual.get("subln", False)
        if self.subln:
            self.q_proj = nn.Linear(width, width, bias=False)
            self.k_proj = nn.Linear(width, width, bias=False)
            self.v_proj = nn.Linear(width, width, bias=False)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, TOWER_NORM_EPSILON) if self.subln else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.subln:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (q + self.q_bias, k, v + self.v_bias))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(self.inner_attn_ln(out.transpose(1, 2).flatten(2)))


class SwigluMLP(nn.Module):
    """The MLP gated by SiLU."""

    def __init__(self, width: int, inner: int, subln: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, TOWER_NORM_EPSILON) if subln else nn.Identity()
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class GeluMLP(nn.Module):
    """The plain MLP."""

    def __init__(self, width: int, inner: int, subln: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, TOWER_NORM_EPSILON) if subln else nn.Identity()
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_ln(F.gelu(self.fc1(x))))


class PerceiverResampler(nn.Module):
    """A fixed number of latents for each image, whatever its number of tokens."""

    def __init__(self, width: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(sizes["num_latents"], width))
        self.layers = nn.ModuleList(PerceiverLayer(width, sizes) for _ in range(sizes["depth"]))
        self.norm = nn.LayerNorm(width, sizes["norm_epsilon"])

    def forward(self, features: Tensor) -> Tensor:
        """[n, t, D] -> [n, l, D]."""
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        return self.norm(latents)


class PerceiverLayer(nn.ModuleList):
    """Attention and feed-forward; a list, because the released weights number the two."""

    def __init__(self, width: int, sizes: dict[str, Any]) -> None:
        super().__init__(
            [PerceiverAttention(width, sizes), feed_forward(width, sizes["mlp_ratio"], sizes["norm_epsilon"])]
        )

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        latents = latents + self[0](features, latents)
        return latents + self[1](latents)


class PerceiverAttention(nn.Module):
    """Attention from an image's latents to its tokens and to the latents themselves."""

    def __init__(self, width: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.heads = sizes["heads"]
        inner = self.heads * sizes["head_width"]
        self.norm_media = nn.LayerNorm(width, sizes["norm_epsilon"])
        self.norm_latents = nn.LayerNorm(width, sizes["norm_epsilon"])
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        k, v = self.to_kv(torch.cat([self.norm_media(features), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (self.to_q(latents), k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def feed_forward(width: int, multiple: int, norm_epsilon: float) -> nn.Sequential:
    """Norm, `multiple` times as wide, back; no biases beside the norm's."""
    inner = multiple * width
    return nn.Sequential(
        nn.LayerNorm(width, norm_epsilon),
        nn.Linear(width, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, width, bias=False),
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * d] -> [batch, heads, length, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of neighbouring channels of [n, heads, t, d], in float32 whatever x is."""
    cos, sin = rope
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
