"""A layout judged: whether each stage's rows fit, how long a step takes, and what that is of the chips' peak."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.plan.choice import Choice
from megavlm.plan.cluster import GIB, Cluster
from megavlm.plan.profile import MemoryUse, RowProfile, StageProfile
from megavlm.plan.step import StepTime

SLACK = 0.05
"""Of what is in use, lost between the allocator's blocks: assumed."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One layout of a run on a cluster."""

    choice: Choice
    cluster: Cluster
    profiles: tuple[StageProfile, ...]
    step: StepTime
    microbatches: int
    """Of one data-parallel rank."""
    tokens: float
    """Of a step, all ranks."""
    images: float
    """Images or tiles of a step."""
    samples: float
    """Of a step."""
    flops: float
    """That the model needs for the rows of a step, as training counts them: the same in every layout."""
    peak: float = 0.0
    """Floating-point operations a second of one GPU that MFU is a share of; none: the chip's in bf16."""

    @property
    def heaviest(self) -> list[RowProfile]:
        """Of each stage the row that needs most: not always the worst one, whose pictures may be dealt more evenly."""
        return [max(_rows(profile), key=lambda row: row.memory.total) for profile in self.profiles]

    @property
    def memory(self) -> list[MemoryUse]:
        """Of each stage, with such rows."""
        return [row.memory for row in self.heaviest]

    @property
    def fullest(self) -> int:
        """The stage that holds most."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def needed(self) -> float:
        """Bytes on that stage, with what the allocator loses."""
        return needed_bytes(self.memory[self.fullest])

    def needed_with(self, tokens: int) -> float:
        """Bytes on the fullest stage if rows had so many tokens, of which each further one costs what it does between
        the mean row and the long one."""
        return max(
            memory.total + _of_token(profile) * (tokens - profile.worst.length)
            for profile, memory in zip(self.profiles, self.memory, strict=True)
        ) * (1 + SLACK)

    @property
    def over(self) -> float:
        """Bytes that it lacks; negative: that are left."""
        return self.needed - self.cluster.chip.memory_bytes

    @property
    def fits(self) -> bool:
        return self.over <= 0

    @property
    def seconds(self) -> float:
        return self.step.seconds

    @property
    def mfu(self) -> float:
        """Share of the chips' peak that the model's own operations reach."""
        peak = self.peak or self.cluster.chip.bf16_tflops * 1e12
        return self.flops / (self.seconds * self.cluster.gpus * peak) if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def hours(self, steps: int) -> float:
        """Of so many steps."""
        return steps * self.seconds / 3600

    @property
    def misfit(self) -> str:
        """By how much it does not fit, and where."""
        stage = f"stage {self.fullest} of {len(self.profiles)}" if len(self.profiles) > 1 else "each GPU"
        with_rows = f"with {self.heaviest[self.fullest].name} rows"
        return f"{stage} needs {self.needed / GIB:.1f} GiB {with_rows}, {self.over / GIB:.1f} more than there are"


def _rows(profile: StageProfile) -> list[RowProfile]:
    """The worst first, which is named where others need as much."""
    return [profile.worst, profile.mean, *([profile.long] if profile.long else [])]


def _of_token(profile: StageProfile) -> float:
    """Bytes."""
    long = profile.long or profile.worst
    tokens = long.length - profile.mean.length
    return max((long.memory.total - profile.mean.memory.total) / tokens, 0.0) if tokens else 0.0


def needed_bytes(memory: MemoryUse) -> float:
    """With what the allocator loses."""
    return memory.total * (1 + SLACK)
