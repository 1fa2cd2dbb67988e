"""Runs by name: each recipe is a function that returns a full RunConfig."""

from __future__ import annotations

from collections.abc import Callable

from megavlm.build.run_config import RunConfig
from megavlm.config import nearest
from megavlm.errors import ConfigError
from megavlm.recipes import tiny

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "decoder-tiny": tiny.decoder_tiny,
    "decoder-tiny-qwen2": tiny.decoder_tiny_qwen2,
}


def recipe(name: str) -> RunConfig:
    """The run of that name."""
    if name not in RECIPES:
        meant = nearest(name, RECIPES)
        guess = f"did you mean {meant}? " if meant else ""
        raise ConfigError("the recipe", name, "is not known", f"{guess}`megavlm recipes` lists them")
    return RECIPES[name]()
