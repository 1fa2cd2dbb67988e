"""What parts of the models cost: floating-point operations of the forward pass, matrix products only.

A multiplication and the addition behind it count as two.
"""

from __future__ import annotations

from megavlm.model.towers.eva_config import EvaConfig
from megavlm.model.towers.siglip_config import SiglipConfig


def product_flops(rows: int, inner: int, columns: int) -> int:
    """The product of matrices [rows, inner] and [inner, columns]."""
    return 2 * rows * inner * columns


def attention_flops(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sum, every query over every key, `width` counting all heads."""
    return product_flops(queries, width, keys) + product_flops(queries, keys, width)


def eva_flops(config: EvaConfig, images: int) -> int:
    """An EVA tower over this many images."""
    tokens, width = config.tokens, config.width
    mlp_products = 3 if config.mlp == "swiglu" else 2
    block = (
        product_flops(tokens, width, 3 * width)
        + attention_flops(tokens, tokens, width)
        + product_flops(tokens, width, width)
        + mlp_products * product_flops(tokens, width, config.mlp_width)
    )
    return images * (product_flops(config.patches, config.patch_values, width) + config.depth * block)


def siglip_flops(config: SiglipConfig, images: int) -> int:
    """A SigLIP tower over this many images."""
    tokens, width = config.tokens, config.width
    block = (
        product_flops(tokens, width, 3 * width)
        + attention_flops(tokens, tokens, width)
        + product_flops(tokens, width, width)
        + 2 * product_flops(tokens, width, config.mlp_width)
    )
    return images * (product_flops(tokens, config.patch_values, width) + config.depth * block)
