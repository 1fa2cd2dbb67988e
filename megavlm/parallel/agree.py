"""Mistakes that one rank sees and all must leave by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from megavlm.errors import MegavlmError, UnavailableError

T = TypeVar("T")


@contextmanager
def agreed() -> Iterator[None]:
    """Run a step without collectives in which any rank may meet a user's mistake; all ranks leave it together.

    Every rank raises the error of the lowest rank that met one, marked so that one rank alone prints it.
    """
    mine: MegavlmError | None = None
    try:
        yield
    except MegavlmError as error:
        mine = error
    except OSError as error:
        problem = f"failed: {error.strerror or error}"
        mine = UnavailableError("the file system", str(error.filename), problem, "check disk space and permissions")
    if not dist.is_initialized() or dist.get_backend() == "fake":  # alone, or with others that are only imagined
        if mine is not None:
            raise mine
        return
    everyone: list[MegavlmError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    first = next((error for error in everyone if error is not None), None)
    if first is not None:
        first.printed_by_rank = everyone.index(first)
        raise first


def said_by_first(value: T) -> T:
    """What rank 0 has; the others may have looked at another moment, or through another cache."""
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]
