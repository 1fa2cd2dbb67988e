"""The device under the program: the only room that knows there may be no CUDA."""

from __future__ import annotations

import torch


def prepare() -> torch.device:
    """Make megatron-core run on this machine and return the device of this process; call it before all else.

    With CUDA this only says which GPU is ours. Without it the CPU adapter is installed, once.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    from megavlm.platform import cpu

    cpu.install()
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that carries this machine's tensors."""
    return "nccl" if torch.cuda.is_available() else "gloo"
