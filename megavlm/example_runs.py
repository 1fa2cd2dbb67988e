"""What the launch scripts in examples/ train: a recipe of a family, or a toy of it.

They add folders where the user names none, so that each stage's script finds what the one before it left.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megavlm import commands
from megavlm.build.data_check import refuse_absent
from megavlm.build.from_checkpoint import run_from_checkpoint
from megavlm.build.run_config import RunConfig
from megavlm.checkpoint.shelf import latest_step, steps_saved
from megavlm.config import nearest
from megavlm.curriculum.options import chosen_stages, parse_stage_options
from megavlm.errors import CheckpointError, ConfigError, MegavlmError
from megavlm.options import parse_options, take_options
from megavlm.parallel.groups import world_from_environment
from megavlm.platform import machine
from megavlm.recipes import recipe, stages_of
from megavlm.toys import make_toys

RUNS = Path("runs")
_SAVING = ("--save-interval", "500", "--keep-last", "3", "--async-save")
_SAVING_OF_TOYS = ("--save-interval", "50", "--keep-last", "3", "--async-save")


@dataclass(frozen=True)
class Family:
    """The models of a family, the first of them by default."""

    models: Mapping[str, str]
    """What `--model` says -> the recipes' name."""
    tiny: str


FAMILIES = {
    "infimm": Family({name: f"infimm-{name}" for name in ("llama2-13b", "vicuna-13b", "zephyr-7b")}, "infimm-tiny"),
    "aquila-vl": Family({"2b": "aquila-vl-2b"}, "aquila-vl-tiny"),
}


def run_example(family: str, stage: str | None, arguments: Sequence[str]) -> int:
    """Train one stage, or all of them; the exit code of `megavlm train`."""
    machine.prepare()
    rank, _ = world_from_environment()
    if any(word in ("-h", "--help") for word in arguments):
        return _help(family, stage)
    try:
        command = train_command(family, stage, arguments, is_first=rank == 0)
    except MegavlmError as error:
        error.printed_by_rank = 0  # all ranks meet it
        raise
    if rank == 0:
        print(f"megavlm train {shlex.join(command)}", flush=True)
    return commands.train(command)


def train_command(family: str, stage: str | None, arguments: Sequence[str], is_first: bool) -> list[str]:
    """The words behind `megavlm train`; the first process makes the toys on its way."""
    own, words = take_options(arguments, [], ["--model"], flags=["--tiny"])
    model = _model(FAMILIES[family], own)
    name = f"{model}/{stage}" if stage else model
    runs = _parsed(name, words)  # mistakes are refused before toys are made
    command = ["--save", str(RUNS / name), *(_SAVING_OF_TOYS if "--tiny" in own else _SAVING)]
    if "--tiny" in own:
        command += make_toys(family, RUNS / "tiny" / family, _value(words, "--data-path"), is_first)
    else:
        # Before weights are asked for: data are what takes longest to get.
        for data in (run.data for run in runs if run.data is not None):
            refuse_absent(data)
    if not _names_weights(words):
        before = _checkpoint_before(model, stage)
        if before is not None:
            command = [*_without(command, "--load-hf"), *_handed_over(before)]
        elif "--tiny" not in own:
            problem = "is missing: the parts that are frozen at first have to be trained ones"
            raise ConfigError("--load-hf", None, problem, "make a folder of them with `megavlm import-hf`, and name it")
    else:
        command = _without(command, "--load-hf")
    return [name, *command, *words]


def _model(family: Family, own: Mapping[str, str]) -> str:
    if "--tiny" in own:
        if "--model" in own:
            raise ConfigError("--model", own["--model"], "stands beside --tiny, which is a model", "leave one out")
        return family.tiny
    asked = own.get("--model", next(iter(family.models)))
    if asked not in family.models:
        close = nearest(asked, family.models)
        guess = f"did you mean {close}? " if close else ""
        raise ConfigError("--model", asked, "is not known", f"{guess}use one of {', '.join(family.models)}")
    return family.models[asked]


def _parsed(name: str, words: Sequence[str]) -> list[RunConfig]:
    """The runs that the user's own words make of the recipe, or of each of its chosen stages."""
    if not stages_of(name):
        return [parse_options(recipe(name), words)]
    own, rest = take_options(words, [], ["--stages"])
    runs = parse_stage_options({stage: recipe(f"{name}/{stage}") for stage in stages_of(name)}, rest, "megavlm train")
    return [runs[stage] for stage in chosen_stages(own.get("--stages"), list(runs))]


def _checkpoint_before(model: str, stage: str | None) -> Path | None:
    """Where the stage before this one saves by default, if it has."""
    stages = stages_of(model)
    if stage is None or stage == stages[0]:
        return None
    folder = RUNS / model / stages[stages.index(stage) - 1]
    return folder if steps_saved(folder) else None


def _handed_over(checkpoint: Path) -> list[str]:
    """The options that start from another stage's end."""
    run, tokenizer = run_from_checkpoint(checkpoint)
    step = latest_step(checkpoint)
    if step is not None and step < run.train.train_iters:
        problem = f"has come to step {step} of {run.train.train_iters}, and this stage starts from its end"
        remedy = f"finish it, or start from it as it is with --pretrained-checkpoint {checkpoint}"
        raise CheckpointError("the stage before this one", str(checkpoint), problem, remedy)
    return ["--pretrained-checkpoint", str(checkpoint), *([] if tokenizer is None else ["--tokenizer", tokenizer])]


def _names_weights(words: Sequence[str]) -> bool:
    spellings = ("--load-hf", "--pretrained-checkpoint", "weights.load_hf", "weights.pretrained_checkpoint")
    return any(word.partition("=")[0] in spellings for word in words)


def _value(words: Sequence[str], option: str) -> str | None:
    """What the user gives an option; the last one counts."""
    found = None
    for place, word in enumerate(words):
        name, equals, text = word.partition("=")
        if name == option:
            found = text if equals else next(iter(words[place + 1 : place + 2]), None)
    return found


def _without(command: Sequence[str], option: str) -> list[str]:
    place = command.index(option) if option in command else len(command)
    return [*command[:place], *command[place + 2 :]]


def _help(family: str, stage: str | None) -> int:
    known = FAMILIES[family]
    print(f"usage: bash {Path(sys.argv[0])} [--model {'|'.join(known.models)} | --tiny] [--option VALUE ...]\n")
    print("--tiny trains a toy model on a toy world, which are made in runs/ first. All else is for `megavlm train`:\n")
    model = next(iter(known.models.values()))
    return commands.train([f"{model}/{stage}" if stage else model, "--help"])
