"""What the facts mean: each check is a pure function from the facts to one finding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megavlm.platform.doctor.facts import APEX_EXTENSIONS, APEX_SUBMODULES, Facts

Status = Literal["ok", "note", "warning", "problem"]
GIB = 2**30

MINIMUM = {
    "python": "3.11",
    "torch": "2.6",
    "megatron-core": "0.16.1",
    "triton": "3.2",
    "transformers": "5.0",
    "safetensors": "0.5",
}
"""As in pyproject.toml; a test holds the two together."""
LEAST_TRANSFORMER_ENGINE = "2.11"
"""The first whose attention takes packed rows in float32; of the extra `gpu` in pyproject.toml."""
TESTED_MEGATRON = "0.16.1"
LEAST_SHARED_MEMORY = GIB


@dataclass(frozen=True)
class Finding:
    """One line of the report: ok, a note, a warning, or a problem that makes training here fail."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` -> (2, 13, 0)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading.group().split(".")) if leading else ()


def check_python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if facts.python >= release(MINIMUM["python"]):
        return Finding("Python", "ok", version)
    return Finding("Python", "problem", version, f"use Python >= {MINIMUM['python']}")


def check_torch(facts: Facts) -> Finding:
    finding = _check_required(facts, "torch")
    if finding.status != "ok":
        return finding
    version = facts.packages["torch"]
    built_for = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPU"
    found = f"{version}, built for {built_for}"
    if facts.torch_error:
        return Finding("torch", "problem", f"{version} cannot be imported: {facts.torch_error}", "reinstall torch")
    if not facts.driver_gpus:
        return Finding("torch", "ok", found)
    if facts.torch_cuda is None:
        found = f"{version} is built without CUDA, beside {_counted(facts.driver_gpus)}"
        return Finding("torch", "problem", found, f"pip install --force-reinstall torch=={version.split('+')[0]}")
    if facts.gpus:
        return Finding("torch", "ok", found)
    if facts.cuda_visible_devices in ("", "-1"):
        return Finding("torch", "note", f"{found}; CUDA_VISIBLE_DEVICES hides the GPUs", "unset it to train on them")
    return Finding(
        "torch",
        "problem",
        f"{found}, but sees none of {_counted(facts.driver_gpus)}",
        f"update the NVIDIA driver to one for CUDA {facts.torch_cuda}, or install torch for an older CUDA",
    )


def check_megatron(facts: Facts) -> Finding:
    version = facts.packages.get("megatron-core")
    if version is None:
        return Finding("megatron-core", "problem", "missing", f"pip install megatron-core=={TESTED_MEGATRON}")
    if release(version) == release(TESTED_MEGATRON):
        return Finding("megatron-core", "ok", version)
    found = f"{version}; {TESTED_MEGATRON} is the version that is tested"
    return Finding("megatron-core", "warning", found, f"pip install megatron-core=={TESTED_MEGATRON}")


def check_triton(facts: Facts) -> Finding:
    version, wanted = facts.packages.get("triton"), facts.torch_wants_triton
    if version is None:
        remedy = f"pip install triton=={wanted}" if wanted else f"pip install 'triton>={MINIMUM['triton']}'"
        if facts.gpus:
            return Finding("triton", "problem", "missing: the kernels of megavlm need it on a GPU", remedy)
        return Finding("triton", "note", "missing: its kernels are replaced by plain torch on CPU")
    if wanted and release(version) != release(wanted):
        found = f"{version}, but torch {facts.packages['torch']} asks for {wanted}"
        return Finding("triton", "warning", found, f"pip install triton=={wanted}")
    return _check_required(facts, "triton")


def check_transformers(facts: Facts) -> Finding:
    return _check_required(facts, "transformers")


def check_safetensors(facts: Facts) -> Finding:
    return _check_required(facts, "safetensors")


def check_transformer_engine(facts: Facts) -> Finding:
    name = "transformer-engine"
    versions = {package: version for package, version in facts.packages.items() if package.startswith(name)}
    build = "pip install --no-build-isolation 'transformer-engine[pytorch]' (see CONTRIBUTING.md)"
    if not versions:
        return Finding(name, "note", "not installed (optional; FP8 needs it)", build if facts.gpus else "")
    found = ", ".join(f"{package.removeprefix('transformer-')} {version}" for package, version in versions.items())
    error = facts.transformer_engine_error
    if error is not None and re.match(r"(ImportError|ModuleNotFoundError)\b", error):
        found = f"{found}: its torch binding cannot be imported, so it is left out ({error})"
        return Finding(name, "warning" if facts.gpus else "note", found, build)
    if error is not None:
        found = f"{found}: fails on import, and takes megatron-core with it ({error})"
        return Finding(name, "problem", found, f"build it for this torch, or pip uninstall {' '.join(versions)}")
    if any(release(version) < release(LEAST_TRANSFORMER_ENGINE) for version in versions.values()):
        remedy = f"install {LEAST_TRANSFORMER_ENGINE} or newer, or train with --transformer-impl local"
        return Finding(name, "warning", f"{found}: too old", remedy)
    for package in versions:
        if _cuda_differs(package, r"cu(\d\d)$", facts):
            found = f"{found}: {package} beside torch for CUDA {facts.torch_cuda}"
            return Finding(name, "warning", found, "install the core for the same CUDA as torch's")
    return Finding(name, "ok", found)


def check_apex(facts: Facts) -> Finding:
    if facts.apex_submodules is None:
        return Finding("apex", "note", "not installed (optional)")
    version = facts.packages.get("apex", "of unknown version")
    missing = [f"apex.{name}" for name in APEX_SUBMODULES if name not in facts.apex_submodules]
    if missing:
        found = f"{version} is not NVIDIA's apex: it has no {' and no '.join(missing)}"
        remedy = "pip uninstall apex; NVIDIA's is built from source (see CONTRIBUTING.md) and optional"
        return Finding("apex", "problem", found, remedy)
    unbuilt = [name for name in APEX_EXTENSIONS if name not in facts.apex_extensions]
    if not unbuilt:
        return Finding("apex", "ok", f"NVIDIA's, {version}")
    # Megatron-core takes apex's FusedAdam by the look of it, and it raises when it is built.
    status: Status = "problem" if "amp_C" in unbuilt and not _has_transformer_engine(facts) else "warning"
    found = f"NVIDIA's, {version}, built without {', '.join(unbuilt)}"
    return Finding("apex", status, found, "rebuild it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (see CONTRIBUTING.md)")


def check_dali(facts: Facts) -> Finding:
    found = {name: version for name, version in facts.packages.items() if name.startswith("nvidia-dali")}
    if not found:
        return Finding("nvidia-dali", "note", "not installed (optional; decodes images on the GPU)")
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if any(_cuda_differs(name, r"cuda(\d\d)0$", facts) for name in found):
        wanted = f"nvidia-dali-cuda{str(facts.torch_cuda).split('.')[0]}0"
        return Finding(
            "nvidia-dali", "warning", f"{text} beside torch for CUDA {facts.torch_cuda}", f"pip install {wanted}"
        )
    return Finding("nvidia-dali", "ok", text)


def check_energon(facts: Facts) -> Finding:
    version = facts.packages.get("megatron-energon")
    return Finding("megatron-energon", *(("ok", version) if version else ("note", "not installed (optional)")))


def check_fused_norms(facts: Facts) -> Finding:
    return _fused("norms", facts, "fused_layer_norm_cuda", otherwise="megavlm's own, over torch")


def check_fused_adam(facts: Facts) -> Finding:
    if not facts.gpus and (_has_transformer_engine(facts) or _has_apex(facts)):
        # Megatron-core chooses by what can be imported, not by what the machine has.
        remedy = "for runs on CPU, use an environment without Transformer Engine and apex"
        return Finding("Adam", "warning", "fused, which needs CUDA; torch sees none", remedy)
    return _fused("Adam", facts, "amp_C", otherwise="torch's own AdamW")


def check_weight_gradient_fusion(facts: Facts) -> Finding:
    name = "weight-gradient accumulation"
    if facts.gpus and "fused_weight_gradient_mlp_cuda" in facts.apex_extensions:
        return Finding(name, "ok", "apex's")
    return Finding(name, "note" if facts.gpus else "ok", "none")


def check_cpu(facts: Facts) -> Finding:
    memory = f", {facts.memory / GIB:.0f} GiB of memory" if facts.memory else ""
    return Finding("CPU", "ok", f"{facts.cores} cores{memory}")


def check_gpus(facts: Facts) -> Finding:
    if not facts.gpus:
        return Finding("GPU", "note", "none that torch can use")
    kinds = Counter(facts.gpus)
    found = "; ".join(
        f"{count} x {gpu.name}, {gpu.memory / GIB:.0f} GiB, capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"bf16 {_yes(gpu.has_bf16)}, FP8 {_yes(gpu.has_fp8)}"
        for gpu, count in kinds.items()
    )
    if len(kinds) > 1:
        return Finding("GPU", "warning", found, "the slowest sets the pace: choose with CUDA_VISIBLE_DEVICES")
    if not facts.gpus[0].has_bf16:
        return Finding("GPU", "warning", found, "train in float32 here; bf16 needs an A100 or newer")
    return Finding("GPU", "ok", found)


def check_collectives(facts: Facts) -> Finding:
    needed = "nccl" if facts.gpus else "gloo"
    found = ", ".join(facts.backends) or "none"
    if needed in facts.backends:
        return Finding("torch.distributed", "ok", found)
    return Finding(
        "torch.distributed", "problem", f"{found}: no {needed}", f"install a torch that is built with {needed}"
    )


def check_shared_memory(facts: Facts) -> Finding:
    if facts.shared_memory is None:
        return Finding("shared memory", "note", "no /dev/shm here")
    found = f"/dev/shm holds {facts.shared_memory / GIB:.2f} GiB"
    if facts.shared_memory >= LEAST_SHARED_MEMORY:
        return Finding("shared memory", "ok", found)
    return Finding(
        "shared memory",
        "warning",
        f"{found}: data workers and NCCL need more",
        "start the container with --shm-size=8g",
    )


def check_c_compiler(facts: Facts) -> Finding:
    path = facts.programs.get("C compiler")
    if path:
        return Finding("C compiler", "ok", path)
    status: Status = "problem" if facts.gpus else "warning"
    return Finding("C compiler", status, "missing: Triton builds its launchers with it", "install gcc, or set CC")


def check_cpp_compiler(facts: Facts) -> Finding:
    path = facts.programs.get("C++ compiler")
    if path:
        return Finding("C++ compiler", "ok", path)
    return Finding("C++ compiler", "warning", "missing: torch.compile needs it on CPU", "install g++, or set CXX")


def check_make(facts: Facts) -> Finding:
    path = facts.programs.get("make")
    return Finding("make", *(("ok", path) if path else ("note", "missing: only the Makefile needs it")))


def check_nvcc(facts: Facts) -> Finding:
    path = facts.programs.get("nvcc")
    missing = "missing: only source builds of apex and Transformer Engine need it"
    return Finding("nvcc", *(("ok", path) if path else ("note", missing)))


CHECKS: dict[str, tuple[Callable[[Facts], Finding], ...]] = {
    "packages": (check_python, check_torch, check_megatron, check_triton, check_transformers, check_safetensors),
    "optional packages": (check_transformer_engine, check_apex, check_dali, check_energon),
    "fused parts that megatron-core takes": (check_fused_norms, check_fused_adam, check_weight_gradient_fusion),
    "machine": (check_cpu, check_gpus, check_collectives, check_shared_memory),
    "tools": (check_c_compiler, check_cpp_compiler, check_make, check_nvcc),
}
"""Heading -> the checks below it, in the order of the report."""


def examine(facts: Facts) -> dict[str, list[Finding]]:
    """Heading -> findings."""
    return {heading: [check(facts) for check in checks] for heading, checks in CHECKS.items()}


def can_train(findings: dict[str, list[Finding]]) -> bool:
    """Whether nothing found would make training fail."""
    return all(finding.status != "problem" for group in findings.values() for finding in group)


def what_runs(facts: Facts, is_able: bool) -> str:
    """What this machine can run, in one line."""
    if not is_able:
        return "no training here until the problems above are mended"
    if not facts.gpus:
        return "CPU processes (gloo), float32 and bf16"
    precisions = ["float32"]
    if all(gpu.has_bf16 for gpu in facts.gpus):
        precisions.append("bf16")
    if all(gpu.has_fp8 for gpu in facts.gpus) and _has_transformer_engine(facts):
        precisions.append("FP8")
    return f"CUDA: {_counted([gpu.name for gpu in facts.gpus])} (nccl), {' and '.join(precisions)}"


def _check_required(facts: Facts, package: str) -> Finding:
    version, least = facts.packages.get(package), MINIMUM[package]
    if version is None:
        return Finding(package, "problem", "missing", f"pip install '{package}>={least}'")
    if release(version) < release(least):
        return Finding(package, "problem", f"{version} is too old", f"pip install '{package}>={least}'")
    return Finding(package, "ok", version)


def _fused(name: str, facts: Facts, extension: str, *, otherwise: str) -> Finding:
    """Transformer Engine's comes first, then apex's; without a GPU neither is asked for."""
    if facts.gpus and _has_transformer_engine(facts):
        return Finding(name, "ok", "Transformer Engine's")
    if facts.gpus and _has_apex(facts) and extension in facts.apex_extensions:
        return Finding(name, "ok", "apex's")
    return Finding(name, "note" if facts.gpus else "ok", otherwise)


def _has_transformer_engine(facts: Facts) -> bool:
    return "transformer-engine-torch" in facts.packages and facts.transformer_engine_error is None


def _has_apex(facts: Facts) -> bool:
    return facts.apex_submodules == APEX_SUBMODULES


def _cuda_differs(package: str, pattern: str, facts: Facts) -> bool:
    """Whether the CUDA version in a distribution's name is another than torch's."""
    named = re.search(pattern, package)
    return bool(named and facts.torch_cuda and named.group(1) != facts.torch_cuda.split(".")[0])


def _counted(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(names).items())


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"
