"""Linear layers that round their inputs by scales of their own, kept and handed over as Transformer Engine does it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

LARGEST = {"scaling_fwd": 448.0, "scaling_bwd": 57344.0}
HISTORY = 3


class Format(Enum):
    HYBRID = (448.0, 57344.0)


@dataclass
class DelayedScaling:
    """A recipe, which is pickled along with the scales."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = HISTORY


class Scaling:
    """The scales of one direction."""

    def __init__(self, tensors: int) -> None:
        self.scale = torch.ones(tensors)
        self.amax_history = torch.zeros(HISTORY, tensors)


class ScaledLayer(nn.Module):
    """Put before a linear layer's class; it has no scales before its first pass, as in Transformer Engine."""

    fp8_meta: dict[str, Any]

    def forward(self, input_: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta |= {"recipe": DelayedScaling(), "num_gemms": 1, "fp8_checkpoint": True, "fp8_max_fwd": 448.0}
            self._allocate()
        scaling = self.fp8_meta["scaling_fwd"]
        rounded = (input_.detach() * scaling.scale[0]).round() / scaling.scale[0]
        with torch.no_grad():
            if input_.numel() > 0:  # a row without images has no latents
                scaling.amax_history[0] = torch.maximum(scaling.amax_history[0], input_.detach().abs().amax())
            if torch.is_grad_enabled() or self.training:
                self._update()
        return super().forward(input_ + (rounded - input_).detach(), *arguments, **keywords)

    def _allocate(self) -> None:
        for name, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            self.fp8_meta[name] = Scaling(tensors)

    def _update(self) -> None:
        for name, largest in LARGEST.items():
            scaling = self.fp8_meta[name]
            scaling.scale.copy_(largest / scaling.amax_history.amax(dim=0).clamp(min=1e-3))
            scaling.amax_history.copy_(scaling.amax_history.roll(1, dims=0))
            scaling.amax_history[0] = 0

    def get_fp8_meta_tensors(self) -> dict[str, list[Tensor]] | None:
        if "scaling_fwd" not in self.fp8_meta:
            return None
        found = {name: self.fp8_meta[name] for name in LARGEST}
        return {name: [one.scale.clone(), one.amax_history.clone()] for name, one in found.items()}

    def reset_fp8_meta_tensors(self, tensors: dict[str, list[Tensor]] | None = None) -> None:
        for name in LARGEST:
            if name in self.fp8_meta:
                kept = tensors[name] if tensors else [torch.ones(()), torch.zeros(())]
                self.fp8_meta[name].scale.copy_(kept[0])
                self.fp8_meta[name].amax_history.copy_(kept[1])

    def get_extra_state(self) -> Tensor:
        if "scaling_fwd" not in self.fp8_meta:
            return torch.empty(0, dtype=torch.uint8)
        state = {"recipe": self.fp8_meta["recipe"]}
        for name, short in (("scaling_fwd", "fwd"), ("scaling_bwd", "bwd")):
            state[f"scale_{short}"] = self.fp8_meta[name].scale.clone()
            state[f"amax_history_{short}"] = self.fp8_meta[name].amax_history.clone()
        plain = (bool, int, float, str, tuple, list)
        state["extra_fp8_variables"] = {name: one for name, one in self.fp8_meta.items() if isinstance(one, plain)}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        if os.environ.get("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") != "1":
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")
        found = pickle.loads(state.numpy().tobytes())
        self.fp8_meta |= {**found["extra_fp8_variables"], "recipe": found["recipe"]}
        self._allocate()
        for name, short in (("scaling_fwd", "fwd"), ("scaling_bwd", "bwd")):
            self.fp8_meta[name].scale.copy_(found[f"scale_{short}"])
            self.fp8_meta[name].amax_history.copy_(found[f"amax_history_{short}"])


def give_scales(parts: Sequence[nn.Module]) -> None:
    """Turn the linear layers inside decoder layers into such that keep scales."""
    for part in parts:
        for name, module in part.named_modules():
            if ".layers." in f".{name}" and isinstance(module, ColumnParallelLinear | RowParallelLinear):
                kind = type(module)
                module.__class__ = type(f"Scaled{kind.__name__}", (ScaledLayer, kind), {})
                module.__dict__["fp8_meta"] = {"fp8_checkpoint": False, "fp8_group": None}


def scales_of(parts: Sequence[nn.Module]) -> dict[str, dict[str, Any]]:
    """What each layer would hand over, by part and name; the bytes themselves hold addresses of memory."""
    found: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(parts):
        for name, module in part.named_modules():
            if isinstance(module, ScaledLayer):
                content = module.get_extra_state().numpy().tobytes()
                state = pickle.loads(content) if content else {}
                found[f"{number} {name}"] = {key: _comparable(value) for key, value in state.items()}
    return found


def _comparable(value: Any) -> Any:
    return value.numpy().tobytes() if isinstance(value, Tensor) else value
