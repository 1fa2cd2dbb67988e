"""Every kernel test: Triton's path, memory poisoned before it is written, numbers drawn anew each run."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from interpreter import mend_interpreter

import megavlm_kernels

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SEED = "MEGAVLM_TEST_SEED"

if IS_INTERPRETED:
    mend_interpreter()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def triton_path() -> Iterator[None]:
    with megavlm_kernels.use("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that a kernel that leaves a hole is seen; also refuses non-deterministic operations."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Printed with a failure; MEGAVLM_TEST_SEED repeats it."""
    chosen = int(os.environ.get(SEED, random.randrange(2**31)))
    print(f"{SEED}={chosen}")
    torch.manual_seed(chosen)
    return chosen
