"""Facts about the accelerators that torch sees, and what a chip of a given compute capability can do."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_BF16_CAPABILITY = (8, 0)
FIRST_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory: int
    """Bytes."""
    capability: tuple[int, int]
    """CUDA compute capability, as (9, 0) for an H100."""

    @property
    def has_bf16(self) -> bool:
        return self.capability >= FIRST_BF16_CAPABILITY

    @property
    def has_fp8(self) -> bool:
        return self.capability >= FIRST_FP8_CAPABILITY


def visible_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices of this process, none where torch was built without CUDA or finds no driver."""
    import torch  # here, not above: `megavlm doctor` has to run where torch is missing or broken

    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(one.name, one.total_memory, (one.major, one.minor)) for one in properties)
