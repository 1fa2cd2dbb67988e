"""The subcommands of `megavlm data`, each a thin function."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TypeVar

from megavlm.config import Config, nearest
from megavlm.data.catalog import check, entries_of, prepared_counts, table_of
from megavlm.data.index_command import IndexConfig, index_folder
from megavlm.data.inspection import InspectConfig, inspect_folder
from megavlm.data.inspection import as_json as inspection_as_json
from megavlm.data.inspection_png import write_png
from megavlm.data.inspection_text import print_inspection
from megavlm.data.ledger import check_ledger, order_of_ledger
from megavlm.data.lint import Bad, LintConfig, lint
from megavlm.data.prepare import PrepareConfig, check_worth, prepare, summary
from megavlm.data.preview import PreviewConfig
from megavlm.data.preview_page import write_preview
from megavlm.data.readers.registry import READERS
from megavlm.errors import ConfigError
from megavlm.options import parse_options, take_options

HELP = ("-h", "--help")
C = TypeVar("C", bound=Config)


def data(arguments: list[str]) -> int:
    """`megavlm data COMMAND`."""
    if not arguments or arguments[0] in HELP:
        width = max(map(len, COMMANDS))
        print("usage: megavlm data COMMAND [ARGUMENTS]\n\ncommands:")
        for name, function in COMMANDS.items():
            print(f"  {name:<{width}}  {(function.__doc__ or '').partition(': ')[2].splitlines()[0]}")
        print("\n`megavlm data COMMAND --help` explains one command.")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = nearest(name, COMMANDS)
        remedy = f"did you mean `megavlm data {close}`?" if close else f"use one of {', '.join(COMMANDS)}"
        raise ConfigError("command", f"data {name}", "no such command", remedy)
    return COMMANDS[name](rest)


def data_prepare(arguments: list[str]) -> int:
    """`megavlm data prepare SOURCE... --out DIR`: from what you have to shards and their index."""
    first_option = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    sources, options = arguments[:first_option], arguments[first_option:]
    if any(word in HELP for word in options):
        print("megavlm data prepare: a SOURCE is a file, or a folder of files, in one of the formats")
        print("\n".join(f"  {name:<12} {reader.summary}" for name, reader in READERS.items()) + "\n")
    config = parse_options(PrepareConfig(), options, prog="megavlm data prepare SOURCE...")
    report = prepare(sources, config)
    check_worth(report, str(config.out))
    print(summary(report, str(config.out)))
    return 0


def data_index(arguments: list[str]) -> int:
    """`megavlm data index DIR`: make the index of tar shards, ours or others', anew, or count tokens beside it."""
    folders, config = _folders(arguments, IndexConfig(), "index", "DIR")
    print(index_folder(folders[0], config))
    return 0


def data_inspect(arguments: list[str]) -> int:
    """`megavlm data inspect DIR`: counts, and how sizes, tokens and tiles are spread."""
    folders, config = _folders(arguments, InspectConfig(), "inspect", "DIR")
    found = inspect_folder(folders[0], config)
    if config.png is not None:
        write_png(found, config.png)
    if config.json:
        print(json.dumps(inspection_as_json(found), indent=1))
    else:
        print_inspection(found)
    return 0


def data_lint(arguments: list[str]) -> int:
    """`megavlm data lint DIR`: every sample through the whole path; names each bad one, exit code 1 if there are."""
    folders, config = _folders(arguments, LintConfig(), "lint", "DIR")

    def say(bad: Bad) -> None:
        print(json.dumps(bad._asdict()) if config.json else bad, flush=True)

    report = lint(folders[0], config, say)
    print(report, file=sys.stderr if config.json else sys.stdout)
    return 1 if report.bad else 0


def data_preview(arguments: list[str]) -> int:
    """`megavlm data preview DIR... --html FILE`: packed rows as the loader makes them, as a page to look at."""
    folders, config = _folders(arguments, PreviewConfig(), "preview", "DIR...")
    print(write_preview(folders, config))
    return 0


def _folders(arguments: list[str], config: C, command: str, words: str) -> tuple[list[str], C]:
    """The folders, which come first, and what the options behind them say."""
    prog = f"megavlm data {command}"
    first_option = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    folders, options = arguments[:first_option], arguments[first_option:]
    config = parse_options(config, options, prog=f"{prog} {words}")
    if not folders or (len(folders) > 1 and not words.endswith("...")):
        problem = "is missing" if not folders else "is not all: one folder at a time"
        raise ConfigError(f"{prog}: DIR", " ".join(folders) or None, problem, f"write {prog} {words} [--options]")
    return folders, config


def data_catalog(arguments: list[str]) -> int:
    """`megavlm data catalog RECIPE/stage --data DIR`: which data sets of a stage are there, missing, or differ."""
    if not arguments or any(word in HELP for word in arguments):
        print("usage: megavlm data catalog RECIPE[/stage] [--data DIR]\n")
        print("Looks for DIR/FOLDER/dataset.json, FOLDER being what the table's second column says.")
        return 0
    own, rest = take_options(arguments, [], ["--data"])
    if len(rest) != 1:
        raise ConfigError("megavlm data catalog", rest, "takes one RECIPE/stage", "write for example infimm/pretrain")
    print(table_of(check(entries_of(rest[0]), prepared_counts(own["--data"]) if "--data" in own else {})))
    return 0


def data_ledger(arguments: list[str]) -> int:
    """`megavlm data ledger FOLDER`: hold what a run consumed against its order; exit code 1 where they differ."""
    if not arguments or any(word in HELP for word in arguments):
        print("usage: megavlm data ledger FOLDER [--data-path DIR]\n")
        print("FOLDER is the folder `ledger` of a run; --data-path is where its data sets lie now, if they have moved.")
        return 0
    own, rest = take_options(arguments, [], ["--data-path"])
    if len(rest) != 1:
        raise ConfigError("megavlm data ledger", rest, "takes one folder", "write megavlm data ledger FOLDER")
    report = check_ledger(rest[0], order_of_ledger(rest[0], own.get("--data-path")))
    for line in report.wrong:
        print(line)
    verdict = "nothing lost, nothing twice" if not report.wrong else f"{len(report.wrong)} lines do not hold"
    counts = f"{report.damaged} damaged, {report.shortened} cut or left out"
    print(f"{report.steps} steps, {report.samples} samples, {counts}: {verdict}")
    return 1 if report.wrong else 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prepare": data_prepare,
    "index": data_index,
    "inspect": data_inspect,
    "lint": data_lint,
    "preview": data_preview,
    "catalog": data_catalog,
    "ledger": data_ledger,
}
