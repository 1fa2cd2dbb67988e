"""Typed errors: what a user did wrong, in one line that names the place, the value and the remedy.

Code that meets a user's mistake raises one of these; entry points print it with `report` on one rank and exit with
`exit_code`. Our own broken invariants stay `assert`s and tracebacks.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_LONGEST_VALUE = 120


class MegavlmError(Exception):
    """A user's mistake: `where` it is, the `value` found there, the `problem` with it and the `remedy`."""

    exit_code = 2
    printed_by_rank: int | None = None
    """Set where all ranks agreed on this error: the one that prints it. Otherwise whoever raised it does."""

    def __init__(self, where: str, value: Any, problem: str, remedy: str) -> None:
        super().__init__(where, value, problem, remedy)  # all four, so that the error survives pickling
        self.where, self.value, self.problem, self.remedy = where, value, problem, remedy

    def __str__(self) -> str:
        value = repr(self.value)
        if len(value) > _LONGEST_VALUE:
            value = value[: _LONGEST_VALUE - 3] + "..."
        return f"{self.where} = {value}: {self.problem}; {self.remedy}"


class ConfigError(MegavlmError):
    """A setting that is unknown, of the wrong type, or impossible."""


class LayoutError(ConfigError):
    """Parallel degrees that do not fit the model or the number of processes."""


class WeightsError(MegavlmError):
    """A file of weights that is missing, damaged, or of another model."""


class CheckpointError(MegavlmError):
    """A checkpoint that is damaged, incomplete, or of another run."""


class DataError(MegavlmError):
    """A sample that contradicts itself, or that the model cannot take."""


class TooLongError(DataError):
    """A sample that is longer than the run allows and cannot be cut to that."""


class DivergedError(MegavlmError):
    """Training whose loss or gradient is not finite, step after step."""


class UnavailableError(MegavlmError):
    """Something that this machine or this installation cannot do."""


def report(error: MegavlmError) -> int:
    """Print the error in one line on standard error, once over all ranks; return the exit code for the process."""
    if error.printed_by_rank is None or str(error.printed_by_rank) == os.environ.get("RANK", "0"):
        print(f"megavlm: error: {error}", file=sys.stderr, flush=True)
    return error.exit_code
