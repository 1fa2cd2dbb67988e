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

_CHOSEN = (MegavlmError.exit_code, os.EX_TEMPFAIL)


def main(arguments: Sequence[str] | None = None) -> int:
    """torchrun's own arguments."""
    try:
        run(parse_args(sys.argv[1:] if arguments is None else arguments))
    except ChildFailedError as error:
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
