"""One command line for several stages: options for all of them, and options for one, written `STAGE:` before it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megavlm.build.run_config import RunConfig
from megavlm.config import nearest
from megavlm.errors import ConfigError, MegavlmError
from megavlm.options import parse_options

_OF_STAGE = re.compile(r"([\w.-]+):(--[a-z].*|[A-Za-z_][\w.]*=.*)", re.DOTALL)


def parse_stage_options(runs: Mapping[str, RunConfig], words: Sequence[str], prog: str) -> dict[str, RunConfig]:
    """Each stage's run as the command line changes it; what is written for one stage wins over what is for all.

    `--train-iters 10` and `train.train_iters=10` are for all stages, `finetune:--train-iters=10`,
    `finetune:--train-iters 10` and `finetune:train.train_iters=10` for one.
    """
    found = {}
    for name, own in words_of_stages(words, list(runs)).items():
        try:
            found[name] = parse_options(runs[name], own, prog)
        except MegavlmError as error:
            raise type(error)(f"{name}: {error.where}", error.value, error.problem, error.remedy) from None
    return found


def words_of_stages(words: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """What of a command line each stage is given: the words for all, then its own."""
    for_all, for_one = _sorted_by_stage(words, names)
    return {name: [*for_all, *for_one[name]] for name in names}


def chosen_stages(text: str | None, names: Sequence[str]) -> list[str]:
    """Those that `--stages a,b` lists, in the order of the model; all where there is none."""
    if text is None:
        return list(names)
    listed = [word.strip() for word in text.split(",") if word.strip()]
    for word in listed:
        _check_stage("--stages", word, names)
    if not listed:
        raise ConfigError("--stages", text, "names no stage", f"use some of {','.join(names)}")
    return [name for name in names if name in listed]


def _sorted_by_stage(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    for_all: list[str] = []
    for_one: dict[str, list[str]] = {name: [] for name in names}
    place = for_all
    for word in words:
        match = _OF_STAGE.fullmatch(word)
        if match:
            _check_stage("the command line", match[1], names, word)
            place, word = for_one[match[1]], match[2]
        elif word.startswith("--") or re.match(r"[A-Za-z_][\w.]*=", word):
            place = for_all
        place.append(word)  # a value goes where its option went
    return for_all, for_one


def _check_stage(where: str, stage: str, names: Sequence[str], word: str | None = None) -> None:
    if stage not in names:
        close = nearest(stage, names)
        guess = f"did you mean {close}? " if close else ""
        problem = f"{stage!r} is no stage of this model" if word else "is no stage of this model"
        raise ConfigError(where, word or stage, problem, f"{guess}the stages are {', '.join(names)}")
