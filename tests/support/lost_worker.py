"""`megavlm` in which a worker is lost in the middle of a step: lost_worker.py RANK kill|raise|stop train RECIPE ...

The other workers stand where a collective of NCCL leaves them: in a call that comes back neither for a closed
connection nor for a signal.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megavlm import signals
from megavlm.cli import main
from megavlm.train import loop
from megavlm.train.callbacks.base import Callback


class LostWorker(Callback):
    def before_step(self, iteration: int) -> None:
        if iteration < 3:
            return
        if int(os.environ["RANK"]) != int(sys.argv[1]):
            own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            own.wait(["what nobody says"], timedelta(minutes=10))
        if sys.argv[2] == "stop":  # lost behind the signal that asks the run to stop
            os.kill(os.getppid(), signal.SIGUSR1)
            while not signals.noted():
                time.sleep(0.01)
        if sys.argv[2] != "raise":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("this is all")


def with_it(*arguments: Any) -> Any:
    return [*build_callbacks(*arguments), LostWorker()]


if __name__ == "__main__":
    build_callbacks = loop.build_callbacks
    loop.build_callbacks = with_it  # type: ignore[assignment]
    sys.exit(main(sys.argv[3:]))
