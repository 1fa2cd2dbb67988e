"""Triton 3.6's interpreter, mended where it miscomputes; call `mend_interpreter` before the first kernel runs.

With numpy >= 2.4 a scalar cannot end a loop; bf16 products multiply the bits as if they were integers; casts to bf16
truncate, where chips round to the nearest even. None of it concerns compiled kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def mend_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, convert, dot = (
        interpreter._patch_lang_tensor,
        interpreter._convert_float,
        interpreter.InterpreterBuilder.create_dot,
    )

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return _widened(data)
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode)

    def dot_of_bf16(self: Any, a: Any, b: Any, d: Any, *settings: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_widened(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *settings)

    interpreter._patch_lang_tensor = patch_tensor_with_index
    interpreter._convert_float = convert_rounding
    interpreter.InterpreterBuilder.create_dot = dot_of_bf16


def _widened(bits: Any) -> Any:
    """bf16 bits (uint16) -> float32."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).float().numpy()
