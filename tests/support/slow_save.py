"""`megavlm` with checkpoints that take long to write, for torchrun: slow_save.py SECONDS train RECIPE ..."""

from __future__ import annotations

import sys
import time
from typing import Any

from megavlm.checkpoint import manager
from megavlm.cli import main


def slowly(*arguments: Any) -> Any:
    time.sleep(float(sys.argv[1]))
    return write_shards(*arguments)


if __name__ == "__main__":
    write_shards = manager.write_shards
    manager.write_shards = slowly  # type: ignore[assignment]
    sys.exit(main(sys.argv[2:]))
