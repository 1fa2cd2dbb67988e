"""How long processes wait for each other, known before they have met.

They join before the command line is read, so that all of them leave together by a mistake in it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

from megavlm.config import value_from_text
from megavlm.errors import MegavlmError
from megavlm.parallel.layout import ParallelConfig

_OPTION = re.compile(
    r"(?:([\w.-]+):)?(?:--distributed-timeout-minutes|parallel\.distributed_timeout_minutes)(?:=(.*))?"
)


def timeout_ahead(words: Sequence[str]) -> float:
    """The minutes that a command line asks for, of several stages the most; a wrong number is refused later."""
    asked: dict[str | None, float] = {}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        match = _OPTION.fullmatch(word)
        if match:
            text = following if match[2] is None else match[2]
            with contextlib.suppress(MegavlmError):
                minutes = {"distributed_timeout_minutes": value_from_text(float, text)}
                asked[match[1]] = ParallelConfig.from_dict(minutes).distributed_timeout_minutes
    return max(asked.values(), default=ParallelConfig.distributed_timeout_minutes)
