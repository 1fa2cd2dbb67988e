"""The subcommands of the console script that are more than one call, each a thin function."""

from __future__ import annotations

import os

from megavlm.build.run_config import check_for_world
from megavlm.errors import ConfigError
from megavlm.export.hf_export import export_model
from megavlm.infer.ask import GenerateConfig, answer_question, read_question
from megavlm.log import get_logger, setup_logging
from megavlm.options import parse_options
from megavlm.parallel import groups as process_groups
from megavlm.parallel.agree import agreed
from megavlm.recipes import RECIPES, recipe
from megavlm.train.loop import train as run_training

logger = get_logger(__name__)


def recipes(arguments: list[str]) -> int:
    """`megavlm recipes`: one line each; `megavlm recipes NAME [--options]`: that run, fully resolved, as YAML."""
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: megavlm recipes [NAME [--options]]\n\nlist the recipes, or print one fully resolved, as YAML")
        return 0
    if arguments:
        name, *options = arguments
        print(parse_options(recipe(name), options, prog=f"megavlm recipes {name}").to_yaml(), end="")
        return 0
    width = max(map(len, RECIPES))
    for name, function in RECIPES.items():
        print(f"{name:<{width}}  {(function.__doc__ or '').strip().splitlines()[0]}")
    return 0


def train(arguments: list[str]) -> int:
    """`megavlm train RECIPE [--options]`, alone or on every rank of torchrun."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: [torchrun --nproc-per-node N -m] megavlm train RECIPE [--options]\n")
        print("`megavlm recipes` lists the recipes; `megavlm train RECIPE --help` all options of one.")
        return 0
    try:
        _train(*arguments)
    finally:
        process_groups.leave()
    return 0


def _train(name: str, *options: str) -> None:
    world_size = process_groups.join()
    setup_logging(int(os.environ.get("RANK", "0")), world_size)
    with agreed():
        run = parse_options(recipe(name), options, prog=f"megavlm train {name}")
        check_for_world(run, world_size)
        if run.weights.export_hf is not None and os.path.exists(run.weights.export_hf):
            raise ConfigError("--export-hf", run.weights.export_hf, "exists already", "give another name")
    logger.info("%s", run.to_yaml())
    groups = process_groups.start(run.parallel, run.train.seed)
    model = run_training(run, groups)
    if run.weights.export_hf is not None:
        export_model(model, run, groups, run.weights.export_hf, tokenizer_from=run.weights.load_hf)
        logger.info("exported to %s", run.weights.export_hf)


def generate(arguments: list[str]) -> int:
    """`megavlm generate --hf DIR --prompt TEXT [--image FILE ...]`, alone or on every rank of torchrun."""
    try:
        world_size = process_groups.join()
        setup_logging(int(os.environ.get("RANK", "0")), world_size)
        with agreed():
            question = read_question(parse_options(GenerateConfig(), arguments, "megavlm generate"), world_size)
        groups = process_groups.start(question.run.parallel)
        answer = answer_question(question, groups)
        if groups.rank == 0:
            print(answer, flush=True)
    finally:
        process_groups.leave()
    return 0
