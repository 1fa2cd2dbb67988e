"""Which places of the output use each source row: what the backward adds up, in an order that never changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AssembleSchedule:
    """Both int32 on the device of the index."""

    order: torch.Tensor
    """[positions * columns]: places in the flattened index, by the source row they name and then as they stand."""
    starts: torch.Tensor
    """[sources + 1]: source row s is named by order[starts[s] : starts[s + 1]]."""


def assemble_schedule(index: torch.Tensor, sources: int) -> AssembleSchedule:
    """For index [positions, columns] into so many rows: those of text and features, and the newline's.

    It makes a sort: a loader that builds it beside the index spares the GPU that.
    """
    ordered, order = torch.sort(index.flatten(), stable=True)
    rows = torch.arange(sources + 1, device=index.device, dtype=index.dtype)
    return AssembleSchedule(order.int(), torch.searchsorted(ordered, rows, out_int32=True))
