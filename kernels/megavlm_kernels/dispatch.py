"""The one switch between Triton and plain PyTorch: auto (Triton for CUDA tensors), triton or reference.

The environment's MEGAVLM_KERNELS sets it for a process, `use` for a block of code. Triton itself is imported by the
first call that needs it, so that the package works where Triton is missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

CHOICES = ("auto", "triton", "reference")
ENVIRONMENT = "MEGAVLM_KERNELS"

_chosen: ContextVar[str | None] = ContextVar("megavlm_kernels_choice", default=None)


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Within the block every op takes this path: "auto", "triton" or "reference"."""
    token = _chosen.set(_checked(choice, "use"))
    try:
        yield
    finally:
        _chosen.reset(token)


def is_without_data(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a shape only, as in a trace that plans memory and time."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def takes_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor runs its Triton kernel; tensors without data always take the reference."""
    choice = _chosen.get() or _checked(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)
    if is_without_data(tensor):
        return False
    return tensor.is_cuda if choice == "auto" else choice == "triton"


def _checked(choice: str, where: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{where} = {choice!r}: no such kernel choice; use {', '.join(CHOICES)}")
    return choice
