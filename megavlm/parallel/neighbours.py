"""The other processes of a run: when one of them is gone, the rest end as well instead of waiting for it for ever.

A process that waits in a collective sees no exception and handles no signal, and NCCL lets it wait until a timeout of
many minutes. So a thread of each process looks for two things: the processes of its own node (the kernel tells of their
end, whatever it was), and a word in the store that all of them met at. Whoever fails leaves one there, and whoever sees
a neighbour end without a word, the launcher included, leaves it in its place.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from datetime import timedelta

import torch.distributed as dist

GRACE = 5.0
"""Seconds that a process has to leave by itself: gloo tells of a lost peer, and what all refuse all leave by."""
_BETWEEN_LOOKS = 0.5
_EXIT_CODE = 1


class Neighbours:
    """Made behind joining the others; from `leave` on nothing ends this process any more."""

    def __init__(self, grace: float = GRACE) -> None:
        self._grace, self._left = grace, threading.Event()
        self._rank = int(os.environ.get("RANK", "0"))
        self._watched: dict[int, int] = {}  # what the kernel tells of the end of -> rank
        self._unknown = _ranks_of_this_node() - {self._rank}
        self._store: dist.Store | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
            return
        # A connection of its own: the run's waits while a process group is made.
        self._store = _connected(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self._store.set(_key(f"process/{self._rank}"), str(os.getpid()))
        self._thread = threading.Thread(target=self._watch, name="neighbours", daemon=True)
        self._thread.start()

    def leave(self, error: BaseException | None) -> None:
        """Tell the others that this process goes, and whether by a failure."""
        self._left.set()
        if self._store is None:
            return
        self._thread.join(self._grace)
        with contextlib.suppress(RuntimeError):  # the store may have gone with the first node
            if error is None or (isinstance(error, SystemExit) and not error.code):
                self._store.set(_key(f"left/{self._rank}"), "")
            else:
                self._look(self._store)  # what fails here may be for want of another
                first_line = (str(error).splitlines() or [""])[0]
                _say(self._store, f"rank {self._rank} has failed ({type(error).__name__}: {first_line})")

    def _watch(self) -> None:
        assert self._store is not None
        problem = None
        while problem is None and not self._left.wait(_BETWEEN_LOOKS):
            try:
                problem = self._look(self._store)
            except RuntimeError:
                problem = "the node of the first process is gone"
        if problem is None or self._left.wait(self._grace):
            return
        line = f"megavlm: error: {problem}: rank {self._rank} waited for it in vain, and ends"
        print(line, file=sys.stderr, flush=True)
        os._exit(_EXIT_CODE)  # the main thread may never come back

    def _look(self, store: dist.Store) -> str | None:
        """Why no process can go on, if so."""
        ended = []
        for rank in [rank for rank in self._unknown if store.check([_key(f"process/{rank}")])]:
            self._unknown.discard(rank)
            try:
                self._watched[os.pidfd_open(int(store.get(_key(f"process/{rank}"))))] = rank
            except ProcessLookupError:
                ended.append(rank)
            except OSError:  # a kernel that does not tell
                continue
        poll = select.poll()
        for descriptor in self._watched:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(0):
            ended.append(self._watched.pop(descriptor))
            os.close(descriptor)
        for rank in ended:
            if not store.check([_key(f"left/{rank}")]):
                _say(store, f"rank {rank} has ended without a word (killed, or out of memory)")
        return store.get(_key("failed")).decode() if store.check([_key("failed")]) else None


def tell_other_nodes(address: str, port: int, start: int, problem: str) -> None:
    """For a launcher: a process that was alone on its node has nobody beside it to say that it was killed."""
    with contextlib.suppress(RuntimeError):
        _say(_connected(address, port), problem, _key("failed", start))


def _connected(address: str, port: int) -> dist.Store:
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))


def _say(store: dist.Store, problem: str, key: str | None = None) -> None:
    """To all processes, unless one was first."""
    store.compare_set(key or _key("failed"), "", problem)


def _key(name: str, start: int | None = None) -> str:
    """Of this start of the processes: torchrun may start them several times around one store."""
    return f"megavlm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if start is None else start}/{name}"


def _ranks_of_this_node() -> set[int]:
    """As far as torchrun says it: it numbers a node's processes without a gap."""
    first = int(os.environ.get("RANK", "0")) - int(os.environ.get("LOCAL_RANK", "0"))
    return set(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "0"))))
