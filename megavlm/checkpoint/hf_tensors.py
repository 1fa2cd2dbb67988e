"""What a Hugging Face folder calls the weights that lie here in slices: ours, read from the left of the state map.

The tensor-parallel slices of each parameter are gathered on the first rank of the group and taken apart into the
folder's tensors, padding left out, so names and values are the same in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavlm.checkpoint.hf_import import named_parameters
from megavlm.model.state_map import Entry, StateMap


def folder_tensors(
    chunks: Iterable[nn.Module],
    state_map: StateMap,
    tensor_group: dist.ProcessGroup,
    value: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach,
    wanted: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> Iterator[tuple[str, Tensor]]:
    """The folder's tensors that these chunks hold, on the group's first rank; the other ranks get none.

    `value` may name something else that has the parameter's shape, such as its gradient; `wanted` chooses parameters.
    """
    entries = {entry.ours: entry for entry in state_map.entries}
    for name, parameter in (pair for chunk in chunks for pair in named_parameters(chunk)):
        if name not in entries:
            # The last stage's copy of a tied embedding, and rows that have been merged into the vocabulary.
            assert name == "output_layer.weight" or getattr(parameter, "beside_vocabulary", False), name
            continue
        if not wanted(parameter):
            continue
        whole = _gather(value(parameter), entries[name], tensor_group)
        if whole is not None:
            yield from _take_apart(whole, entries[name], state_map, tensor_group.size())


def _gather(mine: Tensor, entry: Entry, group: dist.ProcessGroup) -> Tensor | None:
    """The whole parameter on the group's first rank, None on the others."""
    if entry.split == "whole" or group.size() == 1:
        return mine if group.rank() == 0 else None
    first = group.rank() == 0
    slices = [torch.empty_like(mine) for _ in range(group.size())] if first else None
    dist.gather(mine.contiguous(), slices, group=group, group_dst=0)
    return torch.cat(slices, dim=0 if entry.split == "rows" else 1) if slices else None


def _take_apart(whole: Tensor, entry: Entry, state_map: StateMap, tensor_size: int) -> Iterator[tuple[str, Tensor]]:
    if entry.split == "columns":
        (name,) = entry.theirs
        yield name, whole
        return
    parts = {name: whole.new_empty(state_map.shape(entry, name)) for name in entry.theirs}
    top = 0
    for block in state_map.blocks(entry, tensor_size):
        rows = parts[block.source][block.start : block.start + block.count]
        rows.copy_(whole[top : top + block.count].view_as(rows))
        top += block.count
    yield from parts.items()
