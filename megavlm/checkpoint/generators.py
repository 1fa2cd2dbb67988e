"""The random generators that dropout draws from, as tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

_TRACKED = "tracked."


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Of the CPU, of the GPU where there is one, and those that megatron-core keeps beside it."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[_TRACKED + name] = state
    return states


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on with the numbers that would have come next."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    tracked = {name.removeprefix(_TRACKED): state for name, state in states.items() if name.startswith(_TRACKED)}
    get_cuda_rng_tracker().set_states(tracked)
