"""What parts of the models cost: floating-point operations of the forward pass, matrix products only.

A multiplication and the addition behind it count as two. What runs over every query and key that see each other is
given as the number of such pairs: `causal_pairs` for text, queries times keys where all see all.
"""

from __future__ import annotations

from typing import NamedTuple

from megavlm.model.cross_attention import CrossAttentionConfig
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.resampler import ResamplerConfig
from megavlm.model.towers.eva_config import EvaConfig
from megavlm.model.towers.siglip_config import SiglipConfig


class Flops(NamedTuple):
    """A forward pass, by what gradients add to it."""

    weights: float
    """Products of activations and weights."""
    attention: float = 0
    """Products of activations and activations."""

    @property
    def forward(self) -> float:
        return self.weights + self.attention

    def of_step(self, *, flows: bool, learns: bool) -> float:
        """Forward and backward: whether a gradient flows through to what stands before, and whether weights learn."""
        return self.weights * (1 + flows + learns) + self.attention * (1 + 2 * flows)

    def times(self, count: float) -> Flops:
        """So many of it."""
        return Flops(self.weights * count, self.attention * count)


def product_flops(rows: float, inner: int, columns: int) -> float:
    """The product of matrices [rows, inner] and [inner, columns]."""
    return 2 * rows * inner * columns


def attention_flops(pairs: float, width: int) -> float:
    """Scores and weighted sum of so many pairs of a query and a key, `width` counting all heads."""
    return 2 * product_flops(pairs, width, 1)


def causal_pairs(tokens: float, squares: float) -> float:
    """Pairs in documents of causal text: each token sees itself and those before it.

    `tokens` is the sum of the documents' lengths, `squares` that of their squares.
    """
    return (squares + tokens) / 2


def layer_flops(config: DecoderConfig, tokens: float, pairs: float) -> Flops:
    """A decoder layer."""
    query_width = config.num_attention_heads * config.kv_channels
    key_width = config.num_query_groups * config.kv_channels
    weights = (
        product_flops(tokens, config.hidden_size, query_width + 2 * key_width)
        + product_flops(tokens, query_width, config.hidden_size)
        + 3 * product_flops(tokens, config.hidden_size, config.ffn_hidden_size)
    )
    return Flops(weights, attention_flops(pairs, query_width))


def gated_block_flops(
    settings: CrossAttentionConfig,
    hidden: int,
    media_width: int,
    *,
    tokens: float,
    latents: float,
    pairs: float,
) -> Flops:
    """A gated block: `latents` of all images, `pairs` of a token and a latent of its image."""
    weights = (
        2 * product_flops(tokens, hidden, settings.inner_width)
        + product_flops(latents, media_width, 2 * settings.inner_width)
        + 2 * product_flops(tokens, hidden, settings.ff_multiple * hidden)
    )
    return Flops(weights, attention_flops(pairs, settings.inner_width))


def resampler_flops(config: ResamplerConfig, tokens: int, images: float) -> Flops:
    """A perceiver resampler over images of so many tokens each."""
    latents, width, inner = config.num_latents, config.width, config.inner_width
    weights = (
        2 * product_flops(latents, width, inner)
        + product_flops(tokens + latents, width, 2 * inner)
        + 2 * product_flops(latents, width, config.mlp_ratio * width)
    )
    layer = Flops(weights, attention_flops(latents * (tokens + latents), inner))
    return layer.times(images * config.depth)


def eva_flops(config: EvaConfig, images: float) -> Flops:
    """An EVA tower over this many images."""
    patches = product_flops(images * config.patches, config.patch_values, config.width)
    mlp_products = 3 if config.mlp == "swiglu" else 2
    return _tower(patches, config.tokens, config.width, mlp_products * config.mlp_width, images * config.depth)


def siglip_flops(config: SiglipConfig, images: float) -> Flops:
    """A SigLIP tower over this many images."""
    patches = siglip_patch_flops(config, images)
    return _tower(patches, config.tokens, config.width, 2 * config.mlp_width, images * config.depth)


def siglip_patch_flops(config: SiglipConfig, images: float) -> float:
    """Its first product, of the pixels, which no gradient is asked of."""
    return product_flops(images * config.tokens, config.patch_values, config.width)


def _tower(patches: float, tokens: int, width: int, mlp_width: int, blocks: float) -> Flops:
    """Blocks of attention and an MLP behind the product of the patches; `mlp_width` sums up its products."""
    weights = product_flops(tokens, width, 4 * width + mlp_width)
    return Flops(patches + blocks * weights, blocks * attention_flops(tokens**2, width))
