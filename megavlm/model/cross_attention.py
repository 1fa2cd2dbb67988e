"""Masked gated cross-attention from text to the latents of images, tensor-parallel over its heads.

x = x + flag * tanh(attn_gate) * attention(norm(x), latents)
x = x + flag * tanh(ff_gate) * feed_forward(x)

Each token sees the latents of one image: the last one before it in its own sample. Before the first image attention
gives exact zeros; the feed-forward still acts, unless the sample has no image at all (flag 0).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.config import Config, require
from megavlm_kernels import gated_residual, media_attention


@dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig(Config):
    """The gated blocks."""

    every_n_layers: int = 4
    """A block stands before decoder layers n, 2n, ... (counted from 1)."""
    heads: int = 8
    """Attention heads, independent of the decoder's."""
    head_width: int = 64
    """Width of a head."""
    ff_multiple: int = 4
    """Inner width of the feed-forward over the decoder's width."""
    norm_epsilon: float = 1e-5
    """Epsilon of the LayerNorms."""

    def check(self) -> None:
        for name in ("every_n_layers", "heads", "head_width", "ff_multiple"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1", "use a positive number")

    @property
    def inner_width(self) -> int:
        return self.heads * self.head_width

    def stands_before(self, layer_number: int) -> bool:
        """Whether a block stands before this decoder layer, counted from 1."""
        return layer_number % self.every_n_layers == 0


class GatedCrossAttention(MegatronModule):
    """One gated block; where it stands and what it reads is decided by the layer that holds it."""

    def __init__(
        self,
        settings: CrossAttentionConfig,
        config: TransformerConfig,
        provider: BackendSpecProvider,
        media_width: int,
        latents: int,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.latents, self.head_width = latents, settings.head_width
        width, inner = config.hidden_size, settings.inner_width
        with_layer_norm = copy.copy(config)
        with_layer_norm.normalization = "LayerNorm"
        norm = provider.layer_norm(rms_norm=False)
        shared = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
        columns = {**shared, "gather_output": False, "is_expert": False, "tp_group": groups.tp}
        rows = {**shared, "input_is_parallel": True, "is_expert": False, "tp_group": groups.tp}
        column_linear, row_linear = provider.column_parallel_linear(), provider.row_parallel_linear()
        self.norm = norm(config=with_layer_norm, hidden_size=width, eps=settings.norm_epsilon)
        self.to_q = column_linear(width, inner, **columns)
        self.to_kv = column_linear(media_width, 2 * inner, **columns)
        self.to_out = row_linear(inner, width, **rows)
        self.attn_gate = self._gate()
        self.ff_norm = norm(config=with_layer_norm, hidden_size=width, eps=settings.norm_epsilon)
        self.ff_in = column_linear(width, settings.ff_multiple * width, **columns)
        self.ff_out = row_linear(settings.ff_multiple * width, width, **rows)
        self.ff_gate = self._gate()

    def _gate(self) -> nn.Parameter:
        gate = nn.Parameter(torch.zeros(1, dtype=self.config.params_dtype, device=torch.cuda.current_device()))
        # Each rank sees its own slice of the sequence, so its gradient is a part of the sum.
        gate.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return gate

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # A rank holds its slice of the keys and behind it its slice of the values, like the two halves of a gated MLP.
        name = f"{prefix}to_kv.weight"
        state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state

    def forward(self, hidden: Tensor, latents: Tensor, token_map: Tensor) -> Tensor:
        """hidden [s, b, width] -> the same; under sequence parallelism its slice, and so are the latents' rows.

        latents [images * latents of one, 1, media width]; token_map [2, s, b] over the whole sequence: the image of
        each token (-1: none), and whether its sample has one.
        """
        flag = token_map[1].unsqueeze(-1).to(hidden.dtype)
        if self.config.sequence_parallel:
            flag = scatter_to_sequence_parallel_region(flag)
        attended = self._attend(self.to_q(self.norm(hidden))[0], self.to_kv(latents)[0], token_map[0])
        hidden = _add(hidden, self.to_out(attended)[0], self.attn_gate, flag)
        forwarded = self.ff_out(F.gelu(self.ff_in(self.ff_norm(hidden))[0]))[0]
        return _add(hidden, forwarded, self.ff_gate, flag)

    def _attend(self, query: Tensor, key_value: Tensor, image_of_token: Tensor) -> Tensor:
        """query [s, b, heads * d], key_value [rows, 1, 2 * heads * d], both of this rank's heads -> like query."""
        length, batch, width = query.shape
        # Sample by sample, so that neighbours share an image.
        q = query.transpose(0, 1).reshape(batch * length, -1, self.head_width)
        k, v = key_value.unflatten(-1, (2, -1, self.head_width)).squeeze(1).unbind(1)
        per_image = (-1, self.latents, *k.shape[1:])
        images = image_of_token.transpose(0, 1).reshape(-1)
        out = media_attention(q, _images(k, per_image), _images(v, per_image), images, self.head_width**-0.5)
        return out.reshape(batch, length, width).transpose(0, 1).contiguous()


def _images(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows.reshape(rows.size(0) // shape[1], *shape[1:])


def _add(hidden: Tensor, branch: Tensor, gate: Tensor, flag: Tensor) -> Tensor:
    flat = gated_residual(hidden.flatten(0, 1), branch.flatten(0, 1), gate, flag.flatten())
    return flat.view_as(hidden)
