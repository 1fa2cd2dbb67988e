"""Follows a step operation by operation: which storages live, what is computed, what is sent.

The same follower reads a trace without data and a real step. It knows the operations that torch dispatches, so what a
kernel allocates for itself and frees again is not seen.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from megavlm.plan.places import Place, Places
from megavlm.plan.profile import CommOp, GroupName, Kind
from megavlm.plan.work import Work, is_message, message_of, tensors_in, work_of

_NUMBER = torch.ops.aten._local_scalar_dense.default
_NORM = torch.ops.aten.linalg_vector_norm.default
_MOST_NUMBERS = 1 << 22
"""Whole numbers of this many elements are computed for real: they decide shapes."""


@dataclass
class Tally:
    """What operations of one class add up to."""

    flops: float = 0.0
    bytes: float = 0.0
    made: float = 0.0
    count: int = 0

    def add(self, flops: float, bytes_: float, made: float = 0.0) -> None:
        self.flops += flops
        self.bytes += bytes_
        self.made += made
        self.count += 1


Label = tuple[Place, Kind, GroupName, CommOp]


class Follower(TorchDispatchMode):
    """Counts while it is entered; what was there before is not counted."""

    def __init__(self, places: Places, groups: Mapping[str, GroupName] | None = None) -> None:
        super().__init__()
        self.places, self.groups = places, groups or {}
        self.tallies: dict[Label, Tally] = defaultdict(Tally)
        self.live = 0
        """Bytes that are allocated now."""
        self.peak = 0
        self.peaks: dict[Place, int] = {}
        """The most that lived while something of a place ran."""
        self.held = 0
        """Of a forward pass, what is left when its backward pass begins."""
        self._waits = False
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in(args) + tensors_in(tuple(kwargs.values()))
        without_data = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if func is _NUMBER and without_data:
            return 1  # whatever others would have made of it: a norm, a count, no overflow
        if func is _NORM and without_data and self.places.in_step:
            out: Any = _one(inputs[0])
        elif without_data and is_message(func) and func.overloadpacket.__name__.endswith("_coalesced_"):
            out = FakeWork().boxed()  # tensors without data know no joined messages
        elif not without_data and _is_about_numbers(func, args, kwargs, inputs):
            with unset_fake_temporarily():
                out = self.compute(func, args, kwargs)
        else:
            out = self.compute(func, args, kwargs)
        self._count(func, args, kwargs, inputs, out)
        return out

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives."""
        return func(*args, **kwargs)

    def worked(self, place: Place, work: Work, made: int) -> None:
        """An operation that is no view and no message was done, and made storages of so many bytes."""
        self.tallies[place, work.kind, "", ""].add(work.flops, work.bytes, made)

    def _count(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], out: Any) -> None:
        place = self.places.now()
        if is_message(func):
            message = message_of(func, args)
            if message is not None:
                # Between two stages megatron-core sends one of the two ways over the group of all ranks.
                group: GroupName = "pp" if message.op == "p2p" else self.groups.get(message.group, "world")
                self.tallies[place, "comm", group, message.op].add(0.0, message.bytes)
            return
        if self._waits and place.phase == "backward":
            self._waits = False
        outputs = tensors_in(out)
        made = self._hold(inputs, outputs)
        if made is not None or func._schema.is_mutable:
            self.worked(place, work_of(func, args, kwargs, inputs, out), made or 0)
        if self.live > self.peaks.get(place, -1):
            self.peaks[place] = self.live
            self.peak = max(self.peak, self.live)

    def _hold(self, inputs: list[Tensor], outputs: list[Tensor]) -> int | None:
        """Count the storages that an operation made, until they are freed; their bytes, None where there are none."""
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        made: int | None = None
        for tensor in outputs:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in known or key in self._sizes:
                continue
            made = (made or 0) + storage.nbytes()
            self.hold(storage)
        return made

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that lives from now on."""
        key = storage._cdata
        self._sizes[key] = storage.nbytes()
        self.live += self._sizes[key]
        self._references[key] = weakref.ref(storage, lambda _: self._release(key))

    def wait_for_backward(self) -> None:
        """To be called where a forward pass ends: from here on the least that lives until backward is `held`."""
        self._waits, self.held = True, self.live

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._references[key]
        if self._waits:
            self.held = min(self.held, self.live)


def _one(like: Tensor) -> Tensor:
    """A norm that is read as a number."""
    with unset_fake_temporarily():
        return torch.ones((), dtype=like.dtype)


def _is_about_numbers(func: Any, args: Any, kwargs: Mapping[str, Any], inputs: list[Tensor]) -> bool:
    """Whether a trace computes it for real: positions, lengths, tokens, and what follows from them alone."""
    if inputs:
        return all(tensor.numel() <= _MOST_NUMBERS for tensor in inputs)
    if func.overloadpacket is torch.ops.aten.arange and kwargs.get("dtype") is None:
        return all(isinstance(value, int) for value in args)
    return kwargs.get("dtype") in (torch.int64, torch.int32, torch.bool)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
