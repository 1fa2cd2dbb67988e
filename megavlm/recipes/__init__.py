"""Runs by name: each recipe is a function that returns a full RunConfig."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from megavlm.build.run_config import RunConfig
from megavlm.config import nearest
from megavlm.errors import ConfigError
from megavlm.recipes import aquila_vl, infimm, tiny

RECIPES: dict[str, Callable[[], RunConfig]] = {**tiny.RECIPES, **infimm.RECIPES, **aquila_vl.RECIPES}
"""MODEL or MODEL/stage -> the function; a model's stages in the order in which it goes through them."""


def recipe(name: str) -> RunConfig:
    """The run of that name."""
    if name not in RECIPES:
        raise ConfigError("the recipe", name, "is not known", _remedy(name))
    return RECIPES[name]()


def stages_of(model: str) -> list[str]:
    """The stages that a model goes through, in order, without another form of one; none of a name that is no model."""
    known = (*infimm.STAGES, *aquila_vl.STAGES)
    return [name.partition("/")[2] for name in RECIPES if name.startswith(f"{model}/") and name.split("/")[1] in known]


def is_of_a_paper(name: str) -> bool:
    """Whether it is a run that InfiMM's or Aquila-VL-2B's authors made, and not a toy."""
    return name in infimm.RECIPES or name in aquila_vl.RECIPES


def _remedy(name: str) -> str:
    model = name.partition("/")[0]
    stages = [known for known in RECIPES if known.startswith(f"{model}/")]
    if stages:
        return f"use one of {', '.join(stages)}"
    meant = nearest(name, [*RECIPES, *(known.partition("/")[0] for known in RECIPES)])
    guess = f"did you mean {meant}? " if meant else ""
    return f"{guess}`megavlm recipes` lists them"


def listing() -> str:
    """All recipes, each with what it does in a line, the stages of a model together."""
    width = max(map(len, RECIPES))
    groups = []
    for model, names in groupby(RECIPES, lambda name: name.partition("/")[0] if "/" in name else ""):
        lines = [f"{model:<{width}}  All of its stages in order, as one run."] if model else []
        lines += (f"{name:<{width}}  {(RECIPES[name].__doc__ or '').strip().splitlines()[0]}" for name in names)
        groups.append("\n".join(lines))
    return "\n\n".join(groups)
