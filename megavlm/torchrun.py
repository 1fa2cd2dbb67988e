"""torchrun that ends as its workers did: with their exit code where they chose it, and without a traceback then.

Of torchrun's own exit codes a script can't tell a mistake (2) or a run that has saved and wants to go on (75) from a
crash: all are 1. And of a signal it knows that it passed it on, not whether the workers could save.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from megavlm import signals
from megavlm.errors import MegavlmError
from megavlm.parallel.neighbours import tell_other_nodes


def main(arguments: Sequence[str] | None = None) -> int:
    """torchrun's own arguments."""
    known = parse_args(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory(prefix="megavlm-") as folder:
        os.environ[signals.ENDINGS] = folder
        try:
            run(known)
        except ChildFailedError as error:
            code: int = error.get_first_failure()[1].exitcode
            if _all_saved(signals.endings(Path(folder))):
                return os.EX_TEMPFAIL
            _tell_other_nodes(known)
            if code == MegavlmError.exit_code:
                return code
            raise
        except SignalException as error:
            return after_signal(signal.Signals(error.sigval).name, signals.endings(Path(folder)))
    return 0


def _all_saved(endings: Sequence[int | None]) -> bool:
    """Whether each process has said that it ended, and that the same command goes on."""
    return len(endings) > 0 and set(endings) == {os.EX_TEMPFAIL}


def after_signal(name: str, endings: Sequence[int | None]) -> int:
    """A run that has not begun has nothing to lose, and one that was complete has nothing to do."""
    if endings and set(endings) == {0}:
        return 0
    if _all_saved(endings) or not endings:
        print(f"megavlm: {name}: the run can go on from where it was", file=sys.stderr, flush=True)
        return os.EX_TEMPFAIL
    lost = sum(code != os.EX_TEMPFAIL for code in endings)
    problem = f"{lost} of this node's {len(endings)} processes ended without having saved"
    print(f"megavlm: error: {name}: {problem}", file=sys.stderr, flush=True)
    return 1


def _tell_other_nodes(known: Namespace) -> None:
    if known.master_addr and known.node_rank:
        problem = f"a process of node {known.node_rank} has ended before its time"
        tell_other_nodes(known.master_addr, known.master_port, known.max_restarts, problem)


if __name__ == "__main__":
    sys.exit(main())
