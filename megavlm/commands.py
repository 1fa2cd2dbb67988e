"""The subcommands of the console script that are more than one call, each a thin function."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from megavlm import signals
from megavlm.build.data_check import check_data
from megavlm.build.from_checkpoint import run_from_checkpoint
from megavlm.build.from_folder import run_from_folder
from megavlm.build.log_config import check_installed
from megavlm.build.model import build_model
from megavlm.build.run_config import CrossAttentionConfig, PrecisionConfig, RunConfig, check_degrees, check_for_world
from megavlm.curriculum.options import chosen_stages, parse_stage_options
from megavlm.curriculum.run import train_stages
from megavlm.curriculum.stages import place_stages
from megavlm.errors import ConfigError, MegavlmError, report
from megavlm.export.aquila_vl_assemble import assemble_aquila_vl
from megavlm.export.aquila_vl_folder import SPELLINGS, Layout
from megavlm.export.assemble import assemble_infimm
from megavlm.export.hf_export import export_model
from megavlm.export.released import normalise
from megavlm.infer.ask import GenerateConfig, answer_question, read_question
from megavlm.infer.cases import check_cases, read_cases
from megavlm.infer.record import recorded_cases
from megavlm.infer.verify import as_json, table, verify
from megavlm.log import get_logger, setup_logging
from megavlm.model.towers.eva_config import eva_tower
from megavlm.options import parse_options, take_options
from megavlm.parallel import groups as process_groups
from megavlm.parallel.agree import agreed, said_by_first
from megavlm.parallel.neighbours import Neighbours
from megavlm.parallel.timeout import timeout_ahead
from megavlm.recipes import listing, recipe, stages_of
from megavlm.train.loop import train as run_training
from megavlm.train.stopping import EX_TEMPFAIL

logger = get_logger(__name__)

HELP = ("-h", "--help")
_TRAIN_USAGE = """usage: [torchrun --nproc-per-node N -m] megavlm train RECIPE [--options]

`megavlm recipes` lists the recipes; `megavlm train RECIPE --help` all options of one.

RECIPE is MODEL/STAGE for one stage, or MODEL for all of its stages in order:

  megavlm train MODEL --save DIR [--stages STAGE,STAGE] [--option VALUE ...] [STAGE:--option=VALUE ...]

Each stage saves in DIR/STAGE and starts from the weights of the one before. Given again, the command skips what is
finished and goes on with the rest. Options are for all stages, or for one with STAGE: before them. --export-hf OUT
writes OUT/STAGE behind each stage."""
_SOURCES = ("--hf", "--load", "--tokenizer")
"""What names the model of a command."""


def recipes(arguments: list[str]) -> int:
    """`megavlm recipes`: one line each; `megavlm recipes NAME [--options]`: that run, or all of that model's stages,
    fully resolved, as YAML."""
    if arguments[:1] in ([word] for word in HELP):
        print("usage: megavlm recipes [NAME [--options]]\n\nlist the recipes, or print one fully resolved, as YAML")
        return 0
    if arguments:
        name, *options = arguments
        prog = f"megavlm recipes {name}"
        stages = {stage: recipe(f"{name}/{stage}") for stage in stages_of(name)}
        found = parse_stage_options(stages, options, prog).values() or [parse_options(recipe(name), options, prog)]
        print("---\n".join(run.to_yaml() for run in found), end="")
        return 0
    print(listing())
    return 0


def train(arguments: list[str]) -> int:
    """`megavlm train RECIPE [--options]`, alone or on every rank of torchrun; all stages of RECIPE where it has some.

    A run that was asked to stop early has saved, exports nothing, and ends with exit code 75.
    """
    if not arguments or arguments[0] in HELP:
        print(_TRAIN_USAGE)
        return 0
    name, *options = arguments
    if stages_of(name):
        return _train_stages(name, options)
    with _joined(options) as world_size:
        with agreed():
            run = parse_options(recipe(name), options, prog=f"megavlm train {name}")
            check_for_world(run, world_size)
            check_data(run)
            check_installed(run.log)
            _refuse_existing("--export-hf", run.weights.export_hf)
        logger.info("%s", run.to_yaml())
        groups = process_groups.start(run.parallel, run.train.seed)
        outcome = run_training(run, groups)
        if outcome.stopped is not None:
            return signals.ended(EX_TEMPFAIL)
        if run.weights.export_hf is not None:
            export_model(outcome.model, run, groups, run.weights.export_hf, tokenizer_from=run.tokenizer_folder)
            logger.info("exported to %s", run.weights.export_hf)
    return signals.ended(0)


def _train_stages(model: str, arguments: list[str]) -> int:
    with _joined(arguments) as world_size:
        with agreed():
            runs = {stage: recipe(f"{model}/{stage}") for stage in stages_of(model)}
            own, options = take_options(arguments, [], ["--stages"])
            chosen = chosen_stages(own.get("--stages"), list(runs))
            runs = parse_stage_options(runs, options, prog=f"megavlm train {model}")
            # What is on disk is looked at once: the others might see it at another moment.
            rank, _ = process_groups.world_from_environment()
            stages = place_stages(runs, chosen, world_size) if rank == 0 else []
        stopped = train_stages(said_by_first(stages))
    return signals.ended(0 if stopped is None else EX_TEMPFAIL)


def verify_hf(arguments: list[str]) -> int:
    """`megavlm verify-hf`: a folder's model on recorded cases; exit code 1 where it is off by more than allowed."""
    usage = (
        "verify-hf --hf DIR | --load CHECKPOINT --cases FILE [--json] [--tensor-model-parallel-size N ...]\n"
        "       megavlm verify-hf --hf DIR --against transformers [--save-cases FILE] [--seed N] [--json] [...]"
    )
    if _wants_help(arguments, usage):
        return 0
    with _joined(arguments) as world_size:
        with agreed():
            own, options = take_options(
                arguments, [], [*_SOURCES, "--cases", "--against", "--save-cases", "--seed"], flags=["--json"]
            )
            run, _ = _run_of(own, options, "verify-hf")
            check_degrees(run, world_size)
        groups = process_groups.start(run.parallel)
        with _cases_file(own, run, groups.rank) as file:
            with agreed():
                cases = read_cases(file)
                check_cases(cases, file, run)
            deviations = verify(build_model(run, groups), run, groups, cases)
        if groups.rank == 0:
            print(json.dumps(as_json(deviations)) if "--json" in own else table(deviations), flush=True)
    return 0 if all(deviation.is_fine for deviation in deviations) else 1


def export_hf(arguments: list[str]) -> int:
    """`megavlm export-hf`: load a folder or a checkpoint under a layout and write what is held then as a folder."""
    usage = (
        "export-hf --hf DIR --out DIR [--layout transformers|llava-next] [--params-dtype bfloat16]\n"
        "                         [--tensor-model-parallel-size N ...]\n"
        "       megavlm export-hf --load CHECKPOINT --out DIR [--tokenizer DIR] [...]\n\n"
        "CHECKPOINT is a folder that --save has filled, or one checkpoint in it."
    )
    if _wants_help(arguments, usage):
        return 0
    with _joined(arguments) as world_size:
        with agreed():
            own, options = take_options(arguments, ["--out"], [*_SOURCES, "--layout"])
            layout = _layout(own.get("--layout", "transformers"))
            run, tokenizer = _run_of(own, options, "export-hf")
            check_degrees(run, world_size)
            _refuse_existing("--out", own["--out"])
        groups = process_groups.start(run.parallel)
        export_model(build_model(run, groups), run, groups, own["--out"], tokenizer_from=tokenizer, layout=layout)
    return 0


def import_hf(arguments: list[str]) -> int:
    """`megavlm import-hf`: a released folder, or a model's parts, as a folder that a run can start from."""
    usage = (
        "import-hf --hf RELEASED --out DIR [--params-dtype bfloat16]\n"
        "       megavlm import-hf --llm DIR --siglip DIR_OR_FILE --out DIR [--seed N] [--params-dtype bfloat16]\n"
        "       megavlm import-hf --llm DIR --vision FILE --tower NAME --model-type infimm-llama\n"
        "                         --cross-attn-every-n-layers N --out DIR [--seed N] [--params-dtype bfloat16]\n\n"
        "The first takes InfiMM, LLaVA-OneVision, or Aquila-VL in LLaVA-NeXT's layout; the second makes an Aquila-VL\n"
        "out of a Qwen2.5, LLaMA or Mistral folder and a SigLIP; the third an InfiMM."
    )
    if _wants_help(arguments, usage):
        return 0
    _refuse_company("import-hf")
    setup_logging(rank=0, world_size=1)
    given = {word.partition("=")[0] for word in arguments}
    with agreed():
        (_import_released if "--hf" in given else _import_siglip if "--siglip" in given else _import_eva)(arguments)
    return 0


def _refuse_company(command: str) -> None:
    """Refuse to be one of several processes: they would write over one another."""
    _, processes = process_groups.world_from_environment()
    if processes > 1:
        error = ConfigError("processes", processes, f"{command} is the work of one", "start it without torchrun")
        error.printed_by_rank = 0
        raise error


def _import_released(arguments: list[str]) -> None:
    own, rest = take_options(arguments, ["--hf", "--out"], ["--params-dtype"])
    normalise(own["--hf"], own["--out"], _dtype(own, rest))


def _import_siglip(arguments: list[str]) -> None:
    own, rest = take_options(arguments, ["--llm", "--siglip", "--out"], ["--seed", "--params-dtype"])
    dtype, seed = _dtype(own, rest), _whole_number("--seed", own.get("--seed", "1234"))
    assemble_aquila_vl(own["--llm"], own["--siglip"], own["--out"], dtype=dtype, seed=seed)


def _import_eva(arguments: list[str]) -> None:
    needed = ["--llm", "--vision", "--tower", "--model-type", "--cross-attn-every-n-layers", "--out"]
    own, rest = take_options(arguments, needed, ["--seed", "--params-dtype"])
    assemble_infimm(
        own["--llm"],
        own["--vision"],
        eva_tower(own["--tower"]),
        own["--model-type"],
        CrossAttentionConfig(
            every_n_layers=_whole_number("--cross-attn-every-n-layers", own["--cross-attn-every-n-layers"])
        ),
        own["--out"],
        dtype=_dtype(own, rest),
        seed=_whole_number("--seed", own.get("--seed", "1234")),
    )


def generate(arguments: list[str]) -> int:
    """`megavlm generate --hf DIR --prompt TEXT [--image FILE ...]`, alone or on every rank of torchrun."""
    with _joined(arguments, logging.WARNING) as world_size:
        with agreed():
            question = read_question(parse_options(GenerateConfig(), arguments, "megavlm generate"), world_size)
        groups = process_groups.start(question.run.parallel)
        answer = answer_question(question, groups)
        if groups.rank == 0:
            print(answer, flush=True)
    return 0


@contextmanager
def _cases_file(own: Mapping[str, str], run: RunConfig, rank: int) -> Iterator[str]:
    """The file of `--cases`, or one that is recorded now."""
    with agreed():
        if ("--cases" in own) == ("--against" in own):
            raise ConfigError("verify-hf", "--cases", "or --against is what the model is held to", "give one of them")
        if own.get("--against", "transformers") != "transformers":
            raise ConfigError("--against", own["--against"], "is nothing to compare with", "use transformers")
        _refuse_existing("--save-cases", own.get("--save-cases"))
        seed = _whole_number("--seed", own.get("--seed", "1234"))
    if "--cases" in own:
        yield own["--cases"]
    else:
        with recorded_cases(run, rank, own.get("--save-cases"), seed) as file:
            yield file


@contextmanager
def _joined(words: Sequence[str], level: int = logging.INFO) -> Iterator[int]:
    """The processes of this run joined (how many they are), and left at the end, also after an error."""
    try:
        world_size = process_groups.join(timeout_ahead(words))
        setup_logging(process_groups.world_from_environment()[0], world_size, level)
        neighbours = Neighbours()
        try:
            yield world_size
        except BaseException as error:
            neighbours.leave(error)
            _end_at_once_if_others_wait(error)
            raise
        neighbours.leave(None)
    finally:
        process_groups.leave()


def _end_at_once_if_others_wait(error: BaseException) -> None:
    """NCCL's groups are left by all ranks together, and whoever fails alone would wait for the others for minutes, its
    traceback still unsaid."""
    is_agreed = isinstance(error, MegavlmError) and error.printed_by_rank is not None
    if is_agreed or isinstance(error, SystemExit) or process_groups.can_leave_alone():
        return
    code = report(error) if isinstance(error, MegavlmError) else 1
    if not isinstance(error, MegavlmError | KeyboardInterrupt):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_of(own: Mapping[str, str], options: Sequence[str], command: str) -> tuple[RunConfig, str | None]:
    """Of a folder or a checkpoint, with its tokenizer.

    In float32 unless the options say otherwise, for these commands compare and convert; but a checkpoint is exported as
    it was trained.
    """
    if ("--hf" in own) == ("--load" in own):
        problem = "names a Hugging Face folder or --load a checkpoint, one of which is needed"
        raise ConfigError("--hf", own.get("--hf"), problem, f"`megavlm {command} --help` shows both")
    tokenizer: str | None = own.get("--hf")
    if "--hf" in own:
        run = run_from_folder(own["--hf"])
    else:
        run, tokenizer = run_from_checkpoint(own["--load"])
    if "--hf" in own or command == "verify-hf":
        run = run.replace(precision=PrecisionConfig(params_dtype="float32"))
    return parse_options(run, options, prog=f"megavlm {command}"), own.get("--tokenizer", tokenizer)


def _dtype(own: Mapping[str, str], rest: Sequence[str]) -> torch.dtype:
    """What `--params-dtype` says; any other word is one too many."""
    if rest:
        raise ConfigError("import-hf", rest[0], "is no option of this command", "`megavlm import-hf --help` lists them")
    return PrecisionConfig.from_dict({"params_dtype": own.get("--params-dtype", "bfloat16")}).dtype


def _layout(text: str) -> Layout:
    found = next((layout for layout in SPELLINGS if layout == text), None)
    if found is None:
        raise ConfigError("--layout", text, "is not known", f"use one of {', '.join(SPELLINGS)}")
    return found


def _refuse_existing(option: str, folder: str | None) -> None:
    if folder is not None and os.path.exists(folder):
        raise ConfigError(option, folder, "exists already", "give another name")


def _whole_number(option: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(option, text, "is no whole number", "write digits only")
    return int(text)


def _wants_help(arguments: Sequence[str], usage: str) -> bool:
    if not any(word in HELP for word in arguments):
        return False
    print(f"usage: megavlm {usage}")
    return True
