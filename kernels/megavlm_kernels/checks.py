"""What every op asks of its arguments, said in one readable line when it is not so."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value}: {remedy}")


def require_kernel_dtype(**tensors: torch.Tensor) -> None:
    """The kernels take bf16, fp16 and fp32, the same for all tensors of a call."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    fits = len(dtypes) == 1 and dtypes <= set(DTYPES)
    found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
    require(fits, "dtypes", found, "cast all of them to one of bfloat16, float16 and float32")


def require_device(device: torch.device, **tensors: torch.Tensor) -> None:
    """Kernels get plain addresses: a tensor on another device would be read as garbage."""
    for name, tensor in tensors.items():
        require(tensor.device == device, f"{name}.device", tensor.device, f"move it to {device}")
