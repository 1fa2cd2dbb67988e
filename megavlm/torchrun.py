"""torchrun that ends as its workers did: with their exit code where they chose it, and without a traceback then.

Of torchrun's own exit codes a script can't tell a mistake (2) or a run that has saved and wants to go on (75) from a
crash: all are 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from megavlm.errors import MegavlmError
from megavlm.parallel.neighbours import tell_other_nodes

_CHOSEN = (MegavlmError.exit_code, os.EX_TEMPFAIL)


def main(arguments: Sequence[str] | None = None) -> int:
    """torchrun's own arguments."""
    known = parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        run(known)
    except ChildFailedError as error:
        if known.master_addr and known.node_rank:
            problem = f"a process of node {known.node_rank} has ended before its time"
            tell_other_nodes(known.master_addr, known.master_port, known.max_restarts, problem)
        code: int = error.get_first_failure()[1].exitcode
        if code in _CHOSEN:
            return code
        raise
    except SignalException as error:
        print(f"megavlm: {error}: the workers were asked to save and have ended", file=sys.stderr, flush=True)
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main())
