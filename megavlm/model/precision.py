"""Number formats: what weights and activations are kept in, and whether matrix products run in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import fp8_utils

from megavlm.config import Config, option
from megavlm.errors import LayoutError, UnavailableError

# The compute capability from which a chip has the format: Ada and Hopper, and Blackwell for the micro-scaled one.
_FP8_SINCE = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
# Consumer Blackwell lacks some of its products.
_FP8_BEFORE = {"mxfp8": (12, 0)}


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Config):
    """Number formats of a run."""

    params_dtype: Literal["float32", "bfloat16"] = option("bfloat16", name="--params-dtype")
    """Weights and activations; with bfloat16 the optimizer keeps float32 master weights."""
    fp8_format: Literal["none", "e4m3", "hybrid"] = option("none", name="--fp8-format")
    """FP8 matrix products: e4m3 both ways, or hybrid (e4m3 forward, e5m2 for gradients)."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = option("delayed", name="--fp8-recipe")
    """How FP8 scales are found, as Transformer Engine names it."""

    @property
    def dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.params_dtype]


def check_fp8(config: PrecisionConfig, chip: str, capability: tuple[int, int] | None, has_engine: bool) -> None:
    """Refuse FP8 where the chip lacks it (`capability` None: no GPU) or Transformer Engine is not in use."""
    if config.fp8_format == "none":
        return
    since, before = _FP8_SINCE[config.fp8_recipe], _FP8_BEFORE.get(config.fp8_recipe)
    if capability is None or capability < since or (before is not None and capability >= before):
        needs = f"{since[0]}.{since[1]}" + (f" and less than {before[0]}.{before[1]}" if before else "")
        has = "no GPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
        raise UnavailableError(
            "--fp8-format",
            config.fp8_format,
            f"{chip} has {has}; FP8 with the recipe {config.fp8_recipe} needs {needs}",
            "drop --fp8-format and train in bfloat16",
        )
    if not has_engine:
        raise UnavailableError(
            "--fp8-format",
            config.fp8_format,
            "FP8 layers come from Transformer Engine, which is not in use here",
            "install the extra megavlm[gpu] and use --transformer-impl auto",
        )


def check_fp8_rows(config: PrecisionConfig, where: str, tokens: int, sequence_parallel_ranks: int) -> None:
    """Refuse rows whose length FP8 products do not take: 16 tokens together, and 8 on each rank that holds a slice.

    The micro-scaled recipe has a scale for each 32 values, so a slice has whole blocks of them.
    """
    blocks = config.fp8_recipe == "mxfp8"
    unit = 32 * sequence_parallel_ranks if blocks else max(16, 8 * sequence_parallel_ranks)
    if config.fp8_format != "none" and tokens % unit:
        problem = f"is no multiple of {unit}, which products in FP8 need"
        raise LayoutError(where, tokens, problem, f"use {-(-tokens // unit) * unit}, or drop --fp8-format")


def precision_fields(config: PrecisionConfig) -> dict[str, Any]:
    """The fields of TransformerConfig that the number formats decide."""
    fields: dict[str, Any] = {"params_dtype": config.dtype, "bf16": config.dtype == torch.bfloat16}
    if config.fp8_format != "none":
        fields |= {"fp8": config.fp8_format, "fp8_recipe": config.fp8_recipe}
    return fields


def forget_fp8_layers() -> None:
    """Make Transformer Engine let go of the layers of a model that is gone, before another one is built.

    It reduces the scales of all layers that it has met, each over the group they were built with, at every pass: ranks
    that lie elsewhere in another layout would wait for each other.
    """
    if fp8_utils.HAVE_TE:
        fp8_utils.FP8GlobalStateManager.reset()
