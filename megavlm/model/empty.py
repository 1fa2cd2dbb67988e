"""Modules of plain torch without the drawing of first weights: all weights are filled by name afterwards.

The largest tower has 4.4 billion of them, which would be drawn only to be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)

_DRAWING: set[Any] = {torch.Tensor.uniform_, torch.Tensor.normal_, torch.nn.init.uniform_, torch.nn.init.normal_}


class _LeaveAsTheyAre(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if function in _DRAWING:
            return arguments[0] if arguments else (keywords or {})["tensor"]
        return function(*arguments, **(keywords or {}))


def build_empty(build: Callable[[], M], device: torch.device, dtype: torch.dtype) -> M:
    """The module that `build` makes, on the device and in the dtype, holding whatever the memory held."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), _LeaveAsTheyAre():
            return build()
    finally:
        torch.set_default_dtype(before)
