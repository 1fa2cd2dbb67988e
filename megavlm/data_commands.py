"""The subcommands of `megavlm data`, each a thin function."""

from __future__ import annotations

import os
from collections.abc import Callable

from megavlm.config import nearest
from megavlm.data.catalog import check, entries_of, prepared_counts, table_of
from megavlm.data.index_build import build_index
from megavlm.data.ledger import check_ledger, order_of_ledger
from megavlm.data.prepare import PrepareConfig, check_worth, prepare, summary
from megavlm.data.progress import Progress
from megavlm.data.readers.registry import READERS
from megavlm.errors import ConfigError
from megavlm.options import parse_options, take_options

HELP = ("-h", "--help")


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
    """`megavlm data index DIR`: make the index of tar shards, ours or others', such as Energon's, anew."""
    if not arguments or any(word in HELP for word in arguments):
        print("usage: megavlm data index DIR [--into DIR] [--workers N]\n")
        print("DIR is a folder or the URL of an object store; --into is the folder that takes the index of the latter.")
        return 0
    own, rest = take_options(arguments, [], ["--into", "--workers"])
    if len(rest) != 1:
        raise ConfigError("megavlm data index", rest, "takes one folder", "write megavlm data index DIR")
    workers = own.get("--workers", str(len(os.sched_getaffinity(0))))
    if not workers.isdecimal() or int(workers) < 1:
        raise ConfigError("--workers", workers, "is no number of processes", "use 1 or more")
    progress = Progress("indexing", 0, "samples")
    processes = int(workers) if int(workers) > 1 else 0
    report = build_index(
        rest[0], own.get("--into"), workers=processes, on_progress=lambda _, done: progress.update(done)
    )
    progress.finish(report.samples)
    print(summary(report, own.get("--into", rest[0])))
    return 0


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
    print(
        f"{report.steps} steps, {report.samples} samples, {report.noted} noted as damaged, cut or left out: {verdict}"
    )
    return 1 if report.wrong else 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prepare": data_prepare,
    "index": data_index,
    "catalog": data_catalog,
    "ledger": data_ledger,
}
