"""The SigLIP vision tower: patch rows in, the last used block's raw output out.

Letters of shapes: n images, t tokens of an image (one a patch, no class token), D width, h heads, d head width.
Images never see each other, so any number of them runs in one call, zero included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megavlm.model.towers.siglip_config import SiglipConfig


class SiglipTower(nn.Module):
    """The tower of LLaVA-OneVision and Aquila-VL: no pooling head, and features from before the last norm."""

    def __init__(self, config: SiglipConfig, recompute: bool = False) -> None:
        """`recompute`: keep only the input of each block for backward, and compute the rest again."""
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.patch_embedding = nn.Linear(config.patch_values, config.width)
        self.position_embedding = nn.Parameter(torch.zeros(config.tokens, config.width))
        self.blocks = nn.ModuleList(SiglipBlock(config) for _ in range(config.depth))
        # The features bypass it. It is held because checkpoints hold it and must get it back; it gets no gradient, so
        # nothing that waits for one may count it in.
        self.post_layernorm = nn.LayerNorm(config.width, config.norm_epsilon).requires_grad_(False)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch rows [n * t, 3 * patch_size**2] (see `megavlm.tiles`) -> [n, t, D]."""
        config = self.config
        assert patches.size(0) % config.tokens == 0, f"{patches.size(0)} rows make no whole images"
        x = self.patch_embedding(patches).view(-1, config.tokens, config.width) + self.position_embedding
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x


class SiglipBlock(nn.Module):
    """Attention and MLP on a residual stream, a norm before each."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.attention = SiglipAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, D] -> [n, t, D]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class SiglipAttention(nn.Module):
    """Bidirectional attention within each image; one product makes queries, keys and values, in this order."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, D] -> [n, t, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [n, h, t, d]
        # On GPUs the flash kernel of older torch refuses a batch of none (pytorch issue 165944). The values are then as
        # empty as its output would be, and keep the weights connected.
        out = F.scaled_dot_product_attention(q, k, v) if x.size(0) else v
        return self.proj(out.transpose(1, 2).flatten(2))


class SiglipMLP(nn.Module):
    """The MLP with the tanh form of GELU."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))
