"""The perceiver resampler: the features of each image, however many, become a fixed number of latents.

Letters of shapes: n images, t tokens of an image, l latents, D width, h heads, d head width. Images never see each
other, so any number of them runs in one call, zero included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavlm.config import Config, require
from megavlm.model.state_map import Entry, StateMap, expand_layers
from megavlm_kernels import resampler_attention


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig(Config):
    """A perceiver resampler."""

    width: int
    """Width of the features and of the latents: that of the vision tower."""
    depth: int = 6
    """Layers."""
    num_latents: int = 64
    """Latents that stand for an image."""
    heads: int = 8
    """Attention heads."""
    head_width: int = 64
    """Width of an attention head."""
    mlp_ratio: int = 4
    """Inner width of the MLP, in widths."""
    norm_epsilon: float = 1e-5
    """Epsilon of all LayerNorms."""

    def check(self) -> None:
        for name in ("width", "depth", "num_latents", "heads", "head_width", "mlp_ratio"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1", "use a positive number")
        require(self.norm_epsilon > 0, self, "norm_epsilon", "must be positive", "use 1e-5")

    @property
    def inner_width(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_width


class Resampler(nn.Module):
    """Learned latents that read each image in turn with itself, layer by layer."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.num_latents, config.width))
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.norm_epsilon)

    def forward(self, features: Tensor) -> Tensor:
        """[n, t, D] -> [n, l, D]."""
        latents = self.latents.expand(features.size(0), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.norm(latents)


class ResamplerLayer(nn.Module):
    """Attention and MLP on the latents' residual stream."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.attention = ResamplerAttention(config)
        self.mlp = ResamplerMLP(config)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """[n, l, D] and [n, t, D] -> [n, l, D]."""
        latents = latents + self.attention(latents, features)
        return latents + self.mlp(latents)


class ResamplerAttention(nn.Module):
    """Latents attend to the features of their image and to its latents, in one softmax."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = config.head_width**-0.5
        self.features_norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.latents_norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.to_q = nn.Linear(config.width, config.inner_width, bias=False)
        self.to_kv = nn.Linear(config.width, 2 * config.inner_width, bias=False)
        self.to_out = nn.Linear(config.inner_width, config.width, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """[n, l, D] and [n, t, D] -> [n, l, D]."""
        images, tokens, _ = features.shape
        latents = self.latents_norm(latents)
        q = self.to_q(latents).unflatten(-1, (self.heads, -1))  # [n, l, h, d]
        k_latents, v_latents = self._keys_and_values(latents)
        k_features, v_features = self._keys_and_values(self.features_norm(features).flatten(0, 1))
        bounds = torch.arange(images + 1, dtype=torch.int32, device=features.device) * tokens
        out = resampler_attention(q, k_features, v_features, k_latents, v_latents, bounds, self.scale)
        return self.to_out(out.flatten(2))

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> keys and values, each [..., h, d]: checkpoints hold both projections as one, keys first."""
        k, v = self.to_kv(x).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return k, v


class ResamplerMLP(nn.Module):
    """The MLP behind its norm."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


def _norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}.weight", {f"{theirs}.weight": "D"}, fresh="ones"),
        Entry(f"{ours}.bias", {f"{theirs}.bias": "D"}, fresh="zeros"),
    )


def _linear(ours: str, theirs: str, shape: str) -> Entry:
    return Entry(f"{ours}.weight", {f"{theirs}.weight": shape}, fresh="linear")


_LAYER = "layers.{i}."

# Letters of shapes: D width, L latents, R width of all heads (2R is twice that), E inner width of the MLP.
_ENTRIES = (
    Entry("latents", {"latents": "L D"}, fresh="unit normal"),
    *_norm("norm", "norm"),
    *_norm(_LAYER + "attention.features_norm", _LAYER + "0.norm_media"),
    *_norm(_LAYER + "attention.latents_norm", _LAYER + "0.norm_latents"),
    _linear(_LAYER + "attention.to_q", _LAYER + "0.to_q", "R D"),
    _linear(_LAYER + "attention.to_kv", _LAYER + "0.to_kv", "2R D"),
    _linear(_LAYER + "attention.to_out", _LAYER + "0.to_out", "D R"),
    *_norm(_LAYER + "mlp.norm", _LAYER + "1.0"),
    _linear(_LAYER + "mlp.up", _LAYER + "1.1", "E D"),
    _linear(_LAYER + "mlp.down", _LAYER + "1.3", "D E"),
)


def resampler_state_map(config: ResamplerConfig, theirs: str = "model.perceiver.", ours: str = "") -> StateMap:
    """The table of this resampler, its tensors under the prefix `theirs` and its parameters under `ours`."""
    return StateMap(
        entries=tuple(entry.under(ours, theirs) for entry in expand_layers(_ENTRIES, config.depth)),
        sizes={
            "D": config.width,
            "L": config.num_latents,
            "R": config.inner_width,
            "2R": 2 * config.inner_width,
            "E": config.mlp_ratio * config.width,
        },
        query_groups=1,
    )
