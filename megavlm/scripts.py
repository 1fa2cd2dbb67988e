"""How the launch scripts in examples/ begin: signals are listened to before anything that takes long is imported."""

from __future__ import annotations

from collections.abc import Sequence

from megavlm import signals
from megavlm.cli import INTERRUPTED
from megavlm.errors import MegavlmError, report
from megavlm.log import quiet_third_parties


def run_script(family: str, stage: str | None, arguments: Sequence[str]) -> int:
    """Train one stage of a family's model, or all of them; the exit code of `megavlm train`."""
    quiet_third_parties()
    signals.listen()
    from megavlm.example_runs import run_example

    try:
        return run_example(family, stage, arguments)
    except MegavlmError as error:
        return report(error)
    except KeyboardInterrupt:
        return INTERRUPTED
