"""The console script `megavlm`: a table of subcommands, each one function elsewhere, loaded when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from megavlm import __version__, signals
from megavlm.errors import ConfigError, MegavlmError, report
from megavlm.log import quiet_third_parties

COMMANDS: dict[str, tuple[str, str]] = {
    "recipes": ("list the runs known by name, or print one fully resolved", "megavlm.commands:recipes"),
    "plan": ("will it fit, how fast will it be: a run traced without a GPU", "megavlm.plan_commands:plan"),
    "train": ("train a recipe, alone or under torchrun", "megavlm.commands:train"),
    "data": ("prepare, index, check and look at data sets", "megavlm.data_commands:data"),
    "import-hf": ("a released folder, or a model's parts, as a folder to start from", "megavlm.commands:import_hf"),
    "export-hf": ("load a Hugging Face folder under a layout and write it again", "megavlm.commands:export_hf"),
    "verify-hf": ("prove a folder against recorded cases", "megavlm.commands:verify_hf"),
    "generate": ("go on with a text and its images, alone or under torchrun", "megavlm.commands:generate"),
    "bench": ("measure this machine, ours against theirs, as one table", "megavlm.bench.command:bench"),
    "doctor": ("what is installed, what is wrong, what this machine can run", "megavlm.platform.doctor:main"),
}
"""Name -> (one line of help, `module:function`); the function takes the arguments and returns the exit code."""

INTERRUPTED = 130
STOPS_WHEN_ASKED = ("train",)
"""Commands that save on a signal and end by themselves."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; a user's mistake ends in one line on standard error and exit code 2."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except MegavlmError as error:
        return report(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def run(arguments: Sequence[str]) -> int:
    """Find the subcommand and hand it the rest of the arguments."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"megavlm {__version__}")
        return 0
    module, _, function = target_of(arguments[0]).partition(":")
    quiet_third_parties()
    if arguments[0] in STOPS_WHEN_ASKED:
        signals.listen()
    exit_code: int = getattr(importlib.import_module(module), function)(list(arguments[1:]))
    return exit_code


def target_of(command: str) -> str:
    """The `module:function` behind a subcommand."""
    if command in COMMANDS:
        return COMMANDS[command][1]
    nearest = difflib.get_close_matches(command, COMMANDS, n=1)
    suggestion = f"did you mean `megavlm {nearest[0]}`?" if nearest else f"use one of {', '.join(COMMANDS)}"
    raise ConfigError("command", command, "no such command", f"{suggestion} (`megavlm --help` lists them)")


def help_text() -> str:
    """Usage and one line for each subcommand."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, (line, _) in COMMANDS.items())
    return (
        "usage: megavlm COMMAND [ARGUMENTS]\n\n"
        f"commands:\n{commands}\n\n"
        "`megavlm COMMAND --help` explains one command; `megavlm --version` prints the version."
    )
