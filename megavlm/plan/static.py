"""What lives on a rank from the first step to the last, counted by the storages themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class StaticBytes(NamedTuple):
    """Bytes, each storage counted once, with what it is first used for."""

    weights: int
    gradients: int
    optimizer: int


def static_bytes(parts: Iterable[nn.Module], optimizer: Any) -> StaticBytes:
    """Of a rank's model and its optimizer, once a step has been taken."""
    parameters = [parameter for part in parts for parameter in part.parameters()]
    buffers = [buffer for part in parts for buffer in part.buffers()]
    seen: set[int] = set()
    weights = _new_bytes([*parameters, *buffers], seen)
    gradients_held = [p.main_grad for p in parameters if hasattr(p, "main_grad")]
    gradients = _new_bytes(gradients_held, seen)
    return StaticBytes(weights, gradients, _new_bytes(_state(optimizer), seen))


def _new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def _state(optimizer: Any) -> Iterator[Tensor]:
    """Master weights and moments: of megatron-core's optimizer, those it is chained of, and torch's inside."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", None)
        if inner is None:
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for slots in inner.state.values():
            yield from (value for value in slots.values() if isinstance(value, Tensor))
