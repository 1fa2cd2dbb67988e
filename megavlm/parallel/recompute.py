"""Activation recompute: trade a second forward pass for memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megavlm.config import Config, option, require
from megavlm.errors import LayoutError, UnavailableError
from megavlm.model.precision import PrecisionConfig
from megavlm.parallel.layout import nearest_degrees


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig(Config):
    """Which activations are computed again in the backward pass instead of being kept."""

    granularity: Literal["none", "selective", "full"] = option("none", name="--recompute-granularity")
    """none keeps all; selective recomputes the modules named below; full recomputes whole layers."""
    method: Literal["uniform", "block"] = option("uniform", name="--recompute-method")
    """For full: uniform recomputes all layers in units of num_layers; block the first num_layers of each chunk."""
    num_layers: int = option(1, name="--recompute-num-layers")
    """For full: layers in a unit (uniform), or layers recomputed (block)."""
    modules: tuple[Literal["core_attn", "layernorm", "mlp"], ...] = option(("core_attn",), name="--recompute-modules")
    """For selective: what is recomputed."""
    vision_tower: bool = option(False, name="--recompute-vision-tower")
    """Whether a trained vision tower keeps only the input of each of its blocks."""

    def check(self) -> None:
        require(self.num_layers >= 1, self, "num_layers", "must be at least 1", "use 1 for single layers")
        require(
            self.granularity != "selective" or len(self.modules) > 0,
            self,
            "modules",
            "is empty, so selective recompute would do nothing",
            "name core_attn, layernorm or mlp, or use --recompute-granularity none",
        )


def check_recompute(config: RecomputeConfig, precision: PrecisionConfig, on_gpu: bool, has_engine: bool) -> None:
    """Refuse what needs Transformer Engine on a GPU where it is not in use, and what its delayed scales forbid."""
    if config.granularity != "selective" or "layernorm" not in config.modules:
        return
    if precision.fp8_format != "none" and precision.fp8_recipe == "delayed":
        raise UnavailableError(
            "--recompute-modules",
            config.modules,
            "layernorm cannot be recomputed under the delayed scales of FP8",
            "leave layernorm out, or use another --fp8-recipe",
        )
    if on_gpu and not has_engine:
        raise UnavailableError(
            "--recompute-modules",
            config.modules,
            "recomputing layernorm on a GPU needs Transformer Engine, which is not in use here",
            "install the extra megavlm[gpu], or leave layernorm out",
        )


def check_recompute_units(config: RecomputeConfig, layers_of_chunks: Sequence[int]) -> None:
    """Refuse units of layers that leave a rest in a chunk: megatron-core would reach behind its last layer."""
    if config.granularity != "full" or config.method != "uniform":
        return
    for layers in layers_of_chunks:
        if layers % config.num_layers:
            fitting = nearest_degrees(config.num_layers, lambda unit: all(n % unit == 0 for n in layers_of_chunks))
            raise LayoutError(
                "--recompute-num-layers",
                config.num_layers,
                f"does not divide a chunk of {layers} layers",
                f"use {' or '.join(map(str, fitting))}",
            )


def recompute_fields(config: RecomputeConfig) -> dict[str, Any]:
    """The fields of TransformerConfig that recompute decides."""
    if config.granularity == "none":
        return {}
    if config.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(config.modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": config.method,
        "recompute_num_layers": config.num_layers,
    }
