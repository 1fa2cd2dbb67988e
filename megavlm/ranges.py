"""Names for the parts of a step, as profilers show them. They cost nothing worth naming while nobody profiles.

torch's profiler sees them on any machine, Nsight Systems on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_users = 0


def switch_on() -> None:
    """Someone looks, until they call `switch_off`."""
    global _users
    _users += 1


def switch_off() -> None:
    """One less looks."""
    global _users
    assert _users > 0, "nobody looks"
    _users -= 1


@contextmanager
def named(name: str) -> Iterator[None]:
    """What runs in the block, or in the function that this decorates, is called so."""
    if not _users:
        yield
        return
    with torch.profiler.record_function(name):
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.nvtx.range_pop()
