"""What is installed and what the machine has: gathered once, judged in `checks`.

Nothing optional is imported into this process: versions come from the metadata of the installed distributions, and
Transformer Engine's binding, which may fail in any way, is imported in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

from megavlm.platform.device import Gpu, visible_gpus

DISTRIBUTIONS = (
    "torch",
    "megatron-core",
    "triton",
    "transformers",
    "safetensors",
    "transformer-engine",
    "transformer-engine-torch",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
    "apex",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "megatron-energon",
)
COMPILERS = {"C compiler": ("CC", "gcc", "cc", "clang"), "C++ compiler": ("CXX", "g++", "c++", "clang++")}
"""What it is -> the environment variable that names it, then the usual names."""
PROGRAMS = ("make", "nvcc")
APEX_SUBMODULES = ("normalization", "optimizers")
"""What NVIDIA's apex has, megatron-core takes, and PyPI's package of the same name lacks."""
APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")
"""Top-level modules that a build of NVIDIA's apex with its CUDA parts leaves beside it."""


@dataclass(frozen=True)
class Facts:
    """Everything that the checks judge; a value that does not exist here is empty or None."""

    python: tuple[int, int, int]
    packages: dict[str, str] = field(default_factory=dict)
    """Distribution -> version, of those in DISTRIBUTIONS that are installed."""
    torch_cuda: str | None = None
    """The CUDA version that torch was built for."""
    torch_error: str | None = None
    """Why torch cannot be imported."""
    torch_wants_triton: str | None = None
    """The one version of Triton that the installed torch asks for."""
    backends: tuple[str, ...] = ()
    """Of torch.distributed: gloo, nccl."""
    driver_gpus: tuple[str, ...] = ()
    """Names of the GPUs that the NVIDIA driver lists, whatever torch sees."""
    cuda_visible_devices: str | None = None
    gpus: tuple[Gpu, ...] = ()
    """The GPUs that torch sees."""
    transformer_engine_error: str | None = None
    """Why `transformer_engine.pytorch` cannot be imported, as `ErrorType: message`."""
    apex_submodules: tuple[str, ...] | None = None
    """Of APEX_SUBMODULES, those found; None where there is no package `apex` at all."""
    apex_extensions: tuple[str, ...] = ()
    """Of APEX_EXTENSIONS, those found."""
    shared_memory: int | None = None
    """Size of /dev/shm in bytes."""
    programs: dict[str, str] = field(default_factory=dict)
    """Compiler or program -> where it lies."""
    cores: int = 1
    memory: int | None = None
    """Main memory in bytes."""


def gather_facts() -> Facts:
    """Look at this interpreter and this machine."""
    packages = installed_versions(DISTRIBUTIONS)
    torch_cuda, torch_error, backends, gpus = _torch_facts() if "torch" in packages else (None, None, (), ())
    return Facts(
        python=sys.version_info[:3],
        packages=packages,
        torch_cuda=torch_cuda,
        torch_error=torch_error,
        torch_wants_triton=required_version("torch", "triton") if "torch" in packages else None,
        backends=backends,
        driver_gpus=_driver_gpus(),
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        gpus=gpus,
        transformer_engine_error=_transformer_engine_error(packages),
        apex_submodules=apex_submodules(),
        apex_extensions=tuple(name for name in APEX_EXTENSIONS if importlib.util.find_spec(name) is not None),
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        programs=_programs(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_main_memory(),
    )


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Distribution -> version for those of the names that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def required_version(distribution: str, wanted: str) -> str | None:
    """The version that an installed distribution pins another one to, None where it pins none."""
    for requirement in importlib.metadata.requires(distribution) or ():
        pin = re.match(rf"{re.escape(wanted)}\s*\(?==\s*([\w.]+)", requirement)
        if pin and "extra ==" not in requirement:
            return pin.group(1)
    return None


def apex_submodules() -> tuple[str, ...] | None:
    """Which submodules of NVIDIA's apex the installed `apex` has, found without importing it; None without any."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    return tuple(name for name in APEX_SUBMODULES if PathFinder.find_spec(f"apex.{name}", folders) is not None)


def _torch_facts() -> tuple[str | None, str | None, tuple[str, ...], tuple[Gpu, ...]]:
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a broken install fails with ImportError, OSError, RuntimeError, ...
        return None, f"{type(error).__name__}: {error}", (), ()
    backends: tuple[str, ...] = ()
    if dist.is_available():
        available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
        backends = tuple(name for name, is_there in available.items() if is_there)
    return torch.version.cuda, None, backends, visible_gpus()


def _transformer_engine_error(packages: dict[str, str]) -> str | None:
    if not any(name.startswith("transformer-engine") for name in packages):
        return None
    done = _output_of(sys.executable, "-c", "import transformer_engine.pytorch")
    if done is None:
        return "TimeoutError: the import did not end"
    last_line = (done.stderr.strip().splitlines() or [f"SystemError: exit code {done.returncode}"])[-1]
    return last_line if done.returncode else None


def _driver_gpus() -> tuple[str, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    done = _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return tuple(done.stdout.strip().splitlines()) if done is not None and done.returncode == 0 else ()


def _output_of(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return None


def _programs() -> dict[str, str]:
    wanted = {kind: [os.environ.get(variable), *names] for kind, (variable, *names) in COMPILERS.items()}
    wanted |= {name: [name] for name in PROGRAMS}
    found = {}
    for kind, candidates in wanted.items():
        paths = [path for candidate in candidates if candidate and (path := shutil.which(candidate))]
        if paths:
            found[kind] = paths[0]
    return found


def _main_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
