"""How long work takes on a chip: a roofline for each class of it, at what kernels reach of the chip's peaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megavlm.config import Config, require
from megavlm.errors import ConfigError
from megavlm.plan.profile import OpCost, PlanPart

CALIBRATION = Path(__file__).with_name("calibration.yaml")
IN_FP8: tuple[PlanPart, ...] = ("decoder", "cross_attention")
"""Parts whose products may run in FP8: megatron-core enters it around the decoder's layers, gated blocks included."""


@dataclass(frozen=True, kw_only=True)
class Efficiency(Config):
    """What kernels reach of one chip's peaks."""

    matmul: float
    """Share of the peak of bf16 products that those of a model reach."""
    attention: float
    """Share of the same peak that attention reaches, causal masks counted by half."""
    fp8: float | None = None
    """Share of the peak in FP8 that a model's products reach; none: it is not known."""
    memory: float
    """Share of the memory's bandwidth."""
    fused: float = 1.0
    """Share of elementwise traffic that is left where operations are fused."""
    start_us: float = 0.0
    """Microseconds that an operation takes at least."""
    hides: bool = True
    """Whether arithmetic, traffic and the host's starts of operations hide behind one another, as on a GPU; where the
    host computes itself they add up."""
    operands: float | None = None
    """Share of the memory's bandwidth at which products read and write their matrices; none: `memory`."""
    allocated: float | None = None
    """Share of the memory's bandwidth at which new tensors are given by the system and taken back; none: they cost
    nothing, as where an allocator keeps what it once had."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where each number comes from."""

    def check(self) -> None:
        for name in ("matmul", "attention", "fp8", "memory", "fused", "operands", "allocated"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, self, name, "is outside (0, 1]", "use what was measured")
        require(self.start_us >= 0, self, "start_us", "is negative", "use 0 for none")


@dataclass(frozen=True, kw_only=True)
class Decoding(Config):
    """How fast one CPU core makes what the model reads of picture files."""

    pictures: float
    """Pictures a second."""
    tiles: float
    """Tiles a second: what pictures that are cut into many are held to."""
    source: str
    """Where both numbers come from."""

    def check(self) -> None:
        for name in ("pictures", "tiles"):
            require(getattr(self, name) > 0, self, name, "must be positive", "use what was measured")


@dataclass(frozen=True, kw_only=True)
class Calibration(Config):
    """Efficiencies by chip, and what the CPU cores beside it do."""

    chips: dict[str, Efficiency]
    """Chip -> what is reached of it."""
    decoding: Decoding | None = None
    """What a CPU core reaches; none: megavlm's own figure."""

    def of(self, chip: str) -> Efficiency:
        """That of a chip."""
        if chip in self.chips:
            return self.chips[chip]
        remedy = f"use one of {', '.join(self.chips)}, or name a file that has it by --calibration"
        raise ConfigError("calibration", chip, "has no row for this chip", remedy)


def seconds_of(
    flops_per_second: float, bytes_per_second: float, efficiency: Efficiency, in_fp8: float | None = None
) -> Callable[[OpCost], float]:
    """Seconds of computing of a class of work on a chip of these peaks; messages take none of them.

    `in_fp8`: what products reach where Transformer Engine runs them in FP8, in a run that asks for it.
    """
    products = {
        "matmul": flops_per_second * efficiency.matmul,
        "attention": flops_per_second * efficiency.attention,
        "memory": float("inf"),
    }
    bandwidth = bytes_per_second * efficiency.memory
    of_operands = bytes_per_second * (efficiency.operands or efficiency.memory)
    of_new = bytes_per_second * efficiency.allocated if efficiency.allocated else float("inf")
    together = max if efficiency.hides else _sum

    def seconds(cost: OpCost) -> float:
        if cost.kind == "comm":
            return 0.0
        share = efficiency.fused if cost.kind == "memory" else 1.0
        moved = share * cost.bytes / (of_operands if cost.kind == "matmul" else bandwidth)
        rate = in_fp8 if in_fp8 and cost.kind == "matmul" and cost.part in IN_FP8 else products[cost.kind]
        starts = share * cost.count * efficiency.start_us * 1e-6
        return together(cost.flops / rate, moved, cost.made / of_new, starts)

    return seconds


def _sum(*seconds: float) -> float:
    return sum(seconds)
