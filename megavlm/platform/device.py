"""Facts about the accelerators that torch sees, and what a chip of a given compute capability can do."""

from __future__ import annotations

import re
from dataclasses import dataclass

FIRST_BF16_CAPABILITY = (8, 0)
FIRST_FP8_CAPABILITY = (8, 9)

_PEAKS = {
    r"A[18]00-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe|A800 80GB PCIe": 312.0,
    r"A30": 165.0,
    r"A40": 149.7,
    r"L4": 121.0,
    r"L40": 181.0,
    r"L40S": 362.0,
    r"H100 (80|96)GB HBM3|H800|H200|GH200 \d+GB": 989.0,
    r"H100 NVL|H200 NVL": 835.0,
    r"H100 PCIe|H800 PCIe": 756.0,
    r"H20": 148.0,
    r"B200": 2250.0,
    r"GB200": 2500.0,
    r"GeForce RTX 3090": 71.0,
    r"GeForce RTX 4090": 165.0,
}
"""Names of chips, as torch gives them behind "NVIDIA ", and NVIDIA's figures for bfloat16 on tensor cores, summed up in
float32 and without sparsity, in TFLOP/s. The whole name counts: a slice of a chip (MIG) or a variant has another
peak."""


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


def bf16_peak_tflops(name: str) -> float | None:
    """The dense bfloat16 peak of the chip of this name; None where it is not known."""
    return next((peak for names, peak in _PEAKS.items() if re.fullmatch(f"NVIDIA ({names})", name)), None)
