"""Which parts of a model learn; all others keep their bytes.

A frozen parameter needs no gradient, so megatron-core gives it no gradient buffer and no optimizer state, and its
matrix products compute only the gradient of their input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Part = Literal["decoder", "cross_attention", "resampler", "new_tokens", "projector", "newline", "tower"]

PARTS_OF_INFIMM: tuple[Part, ...] = ("decoder", "cross_attention", "resampler", "new_tokens")
PARTS_OF_AQUILA_VL: tuple[Part, ...] = ("decoder", "newline", "projector", "tower")

_PREFIXES: dict[str, Part] = {
    "resampler.": "resampler",
    "new_": "new_tokens",
    "projector.": "projector",
    "image_newline": "newline",
    "tower.": "tower",
}
_UNUSED = ("tower.post_layernorm.",)
"""Held because checkpoints hold them; features go past them, so they get no gradient that anything could wait for."""


def part_of(parameter_name: str) -> Part:
    """The part that a parameter of a pipeline chunk belongs to."""
    for prefix, part in _PREFIXES.items():
        if parameter_name.startswith(prefix):
            return part
    return "cross_attention" if ".gated." in parameter_name else "decoder"


def freeze_all_but(chunks: Iterable[nn.Module], trainable: tuple[Part, ...]) -> None:
    """Let only these parts learn."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(part_of(name) in trainable and not name.startswith(_UNUSED))


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part that this process holds."""

    part: Part
    parameters: int
    trained: int


def count_parts(chunks: Iterable[nn.Module]) -> list[PartCount]:
    """How many parameters each part has here, and how many of them learn."""
    totals: dict[Part, list[int]] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            total = totals.setdefault(part_of(name), [0, 0])
            total[0] += parameter.numel()
            total[1] += parameter.numel() if parameter.requires_grad else 0
    return [PartCount(part, total, trained) for part, (total, trained) in totals.items()]
