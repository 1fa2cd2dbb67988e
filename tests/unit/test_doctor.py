"""`megavlm doctor`: each check on constructed facts, the gathering on real folders, the console for real."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from python_source import ROOT

from megavlm.platform.device import Gpu
from megavlm.platform.doctor import checks, table
from megavlm.platform.doctor.checks import Finding, can_train, examine, release, what_runs
from megavlm.platform.doctor.facts import APEX_EXTENSIONS, Facts, apex_submodules, installed_versions

Check = Callable[[Facts], Finding]

A100 = Gpu("NVIDIA A100-SXM4-80GB", 80 * checks.GIB, (8, 0))
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * checks.GIB, (9, 0))
V100 = Gpu("Tesla V100-SXM2-32GB", 32 * checks.GIB, (7, 0))

LAPTOP = Facts(
    python=(3, 11, 7),
    packages={
        "torch": "2.13.0+cpu",
        "megatron-core": "0.16.1",
        "triton": "3.6.0",
        "transformers": "5.23.0",
        "safetensors": "0.8.0",
    },
    backends=("gloo",),
    shared_memory=8 * checks.GIB,
    programs={name: f"/usr/bin/{name}" for name in ("C compiler", "C++ compiler", "make")},
    cores=2,
    memory=16 * checks.GIB,
)
NODE = replace(
    LAPTOP,
    packages={
        **LAPTOP.packages,
        "torch": "2.13.0",
        "transformer-engine": "2.11.0",
        "transformer-engine-torch": "2.11.0",
        "transformer-engine-cu13": "2.11.0",
        "apex": "0.1",
        "nvidia-dali-cuda130": "2.4.0",
    },
    torch_cuda="13.0",
    torch_wants_triton="3.6.0",
    backends=("gloo", "nccl"),
    driver_gpus=(H100.name,) * 8,
    gpus=(H100,) * 8,
    apex_submodules=("normalization", "optimizers"),
    apex_extensions=APEX_EXTENSIONS,
)


def with_packages(facts: Facts, **versions: str | None) -> Facts:
    """The facts with other versions; None takes a package away. Underscores stand for dashes."""
    packages = {**facts.packages, **{name.replace("_", "-"): version for name, version in versions.items()}}
    return replace(facts, packages={name: version for name, version in packages.items() if version is not None})


def statuses(facts: Facts) -> set[str]:
    return {finding.status for group in examine(facts).values() for finding in group}


@pytest.mark.parametrize(
    ("facts", "runs"),
    [
        (LAPTOP, "CPU processes (gloo), float32 and bf16"),
        (NODE, "CUDA: 8 x NVIDIA H100 80GB HBM3 (nccl), float32 and bf16 and FP8"),
        (replace(NODE, gpus=(A100,)), "CUDA: 1 x NVIDIA A100-SXM4-80GB (nccl), float32 and bf16"),
        (replace(NODE, gpus=(V100,)), "CUDA: 1 x Tesla V100-SXM2-32GB (nccl), float32"),
        (
            with_packages(NODE, transformer_engine_torch=None),
            "CUDA: 8 x NVIDIA H100 80GB HBM3 (nccl), float32 and bf16",
        ),
    ],
)
def test_what_a_machine_runs(facts: Facts, runs: str) -> None:
    assert can_train(examine(facts))
    assert what_runs(facts, True) == runs


def test_a_complete_node_has_nothing_to_mend() -> None:
    assert statuses(NODE) <= {"ok", "note"}


@pytest.mark.parametrize(
    ("facts", "check", "found", "remedy"),
    [
        (replace(LAPTOP, python=(3, 10, 2)), checks.check_python, "3.10.2", "use Python >= 3.11"),
        (with_packages(LAPTOP, torch=None), checks.check_torch, "missing", "pip install 'torch>=2.6'"),
        (with_packages(LAPTOP, torch="2.5.1"), checks.check_torch, "2.5.1 is too old", "pip install 'torch>=2.6'"),
        (
            replace(LAPTOP, torch_error="OSError: libc10.so"),
            checks.check_torch,
            "2.13.0+cpu cannot be imported: OSError: libc10.so",
            "reinstall torch",
        ),
        (
            replace(LAPTOP, driver_gpus=(H100.name,) * 2),
            checks.check_torch,
            "2.13.0+cpu is built without CUDA, beside 2 x NVIDIA H100 80GB HBM3",
            "pip install --force-reinstall torch==2.13.0",
        ),
        (
            replace(NODE, gpus=()),
            checks.check_torch,
            "2.13.0, built for CUDA 13.0, but sees none of 8 x NVIDIA H100 80GB HBM3",
            "update the NVIDIA driver to one for CUDA 13.0, or install torch for an older CUDA",
        ),
        (
            with_packages(LAPTOP, megatron_core=None),
            checks.check_megatron,
            "missing",
            "pip install megatron-core==0.16.1",
        ),
        (
            with_packages(NODE, triton=None),
            checks.check_triton,
            "missing: the kernels of megavlm need it on a GPU",
            "pip install triton==3.6.0",
        ),
        (
            with_packages(LAPTOP, transformers="4.57"),
            checks.check_transformers,
            "4.57 is too old",
            "'transformers>=5.0'",
        ),
        (
            with_packages(LAPTOP, safetensors=None),
            checks.check_safetensors,
            "missing",
            "pip install 'safetensors>=0.5'",
        ),
        (
            replace(NODE, transformer_engine_error="OSError: undefined symbol"),
            checks.check_transformer_engine,
            "takes megatron-core with it (OSError: undefined symbol)",
            "pip uninstall transformer-engine transformer-engine-torch transformer-engine-cu13",
        ),
        (
            replace(NODE, apex_submodules=()),
            checks.check_apex,
            "0.1 is not NVIDIA's apex: it has no apex.normalization and no apex.optimizers",
            "pip uninstall apex",
        ),
        (
            replace(with_packages(NODE, transformer_engine_torch=None), apex_extensions=()),
            checks.check_apex,
            "NVIDIA's, 0.1, built without amp_C, fused_layer_norm_cuda, fused_weight_gradient_mlp_cuda",
            "APEX_CPP_EXT=1 APEX_CUDA_EXT=1",
        ),
        (replace(NODE, backends=("gloo",)), checks.check_collectives, "gloo: no nccl", "built with nccl"),
        (replace(LAPTOP, backends=()), checks.check_collectives, "none: no gloo", "built with gloo"),
        (replace(NODE, programs={}), checks.check_c_compiler, "missing: Triton builds", "install gcc, or set CC"),
    ],
)
def test_a_problem_names_what_was_found_and_the_remedy(facts: Facts, check: Check, found: str, remedy: str) -> None:
    finding = check(facts)
    assert finding.status == "problem"
    assert found in finding.found
    assert remedy in finding.remedy
    assert not can_train(examine(facts))
    assert "mended" in what_runs(facts, can_train(examine(facts)))


@pytest.mark.parametrize(
    ("facts", "check", "status", "found", "remedy"),
    [
        (
            with_packages(LAPTOP, megatron_core="0.19.2"),
            checks.check_megatron,
            "warning",
            "0.19.2; 0.16.1 is the version that is tested",
            "megatron-core==0.16.1",
        ),
        (
            with_packages(NODE, triton="3.5.1"),
            checks.check_triton,
            "warning",
            "3.5.1, but torch 2.13.0 asks for 3.6.0",
            "pip install triton==3.6.0",
        ),
        (with_packages(LAPTOP, triton=None), checks.check_triton, "note", "plain torch on CPU", ""),
        (
            replace(NODE, gpus=(), cuda_visible_devices=""),
            checks.check_torch,
            "note",
            "CUDA_VISIBLE_DEVICES hides the GPUs",
            "unset it",
        ),
        (
            replace(NODE, transformer_engine_error="ModuleNotFoundError: No module named 'transformer_engine_torch'"),
            checks.check_transformer_engine,
            "warning",
            "its torch binding cannot be imported",
            "--no-build-isolation",
        ),
        (
            replace(NODE, torch_cuda="12.8"),
            checks.check_transformer_engine,
            "warning",
            "transformer-engine-cu13 beside torch for CUDA 12.8",
            "for the same CUDA",
        ),
        (
            with_packages(NODE, transformer_engine="2.7.0", transformer_engine_torch="2.7.0"),
            checks.check_transformer_engine,
            "warning",
            "engine 2.7.0, engine-torch 2.7.0, engine-cu13 2.11.0: too old",
            "install 2.11 or newer",
        ),
        (
            replace(NODE, torch_cuda="12.8"),
            checks.check_dali,
            "warning",
            "nvidia-dali-cuda130 2.4.0 beside torch for CUDA 12.8",
            "pip install nvidia-dali-cuda120",
        ),
        (
            replace(NODE, gpus=(), driver_gpus=()),
            checks.check_fused_adam,
            "warning",
            "needs CUDA; torch sees none",
            "without",
        ),
        (replace(NODE, gpus=(A100, H100)), checks.check_gpus, "warning", "1 x NVIDIA H100", "CUDA_VISIBLE_DEVICES"),
        (replace(NODE, gpus=(V100,)), checks.check_gpus, "warning", "capability 7.0, bf16 no, FP8 no", "float32"),
        (
            replace(LAPTOP, shared_memory=64 * 2**20),
            checks.check_shared_memory,
            "warning",
            "/dev/shm holds 0.06 GiB",
            "--shm-size",
        ),
        (replace(LAPTOP, programs={}), checks.check_c_compiler, "warning", "missing", "install gcc"),
        (replace(LAPTOP, programs={}), checks.check_cpp_compiler, "warning", "missing", "install g++"),
    ],
)
def test_what_does_not_stop_training_is_no_problem(
    facts: Facts, check: Check, status: str, found: str, remedy: str
) -> None:
    finding = check(facts)
    assert finding.status == status
    assert found in finding.found
    assert remedy in finding.remedy
    assert can_train(examine(facts))


@pytest.mark.parametrize(
    ("facts", "sources"),
    [
        (NODE, ("Transformer Engine's", "Transformer Engine's", "apex's")),
        (
            replace(NODE, apex_submodules=None, apex_extensions=()),
            ("Transformer Engine's", "Transformer Engine's", "none"),
        ),
        (with_packages(NODE, transformer_engine_torch=None), ("apex's",) * 3),
        (
            replace(
                with_packages(NODE, transformer_engine_torch=None),
                apex_submodules=None,
                apex_extensions=(),
            ),
            ("megavlm's own, over torch", "torch's own AdamW", "none"),
        ),
        (LAPTOP, ("megavlm's own, over torch", "torch's own AdamW", "none")),
    ],
)
def test_fused_parts_say_where_they_come_from(facts: Facts, sources: tuple[str, ...]) -> None:
    assert tuple(finding.found for finding in examine(facts)["fused parts that megatron-core takes"]) == sources


@pytest.mark.parametrize(("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("5.0rc1", (5, 0)), ("dev", ())])
def test_release_reads_the_leading_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers


def test_minimum_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(project["dependencies"]), re.MULTILINE))
    least["python"] = project["requires-python"].removeprefix(">=")
    assert {name: least[name] for name in checks.MINIMUM} == checks.MINIMUM
    engine = f"transformer-engine[pytorch]>={checks.LEAST_TRANSFORMER_ENGINE}"
    assert all(engine in project["optional-dependencies"][extra] for extra in ("gpu", "gpu-cuda12"))


def make_apex(site_packages: Path, *submodules: str) -> None:
    """An installed distribution named apex, whose import fails as PyPI's does without its own dependencies."""
    for name in ("", *submodules):
        folder = site_packages / "apex" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise AssertionError('the doctor imports no patient')\n")
    info = site_packages / "apex-0.9.10.dev0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n")


@pytest.mark.parametrize(
    ("submodules", "status"),
    [((), "problem"), (("normalization",), "problem"), (("normalization", "optimizers"), "ok")],
)
def test_the_wrong_apex_is_told_from_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submodules: tuple[str, ...], status: str
) -> None:
    make_apex(tmp_path, *submodules)
    monkeypatch.syspath_prepend(tmp_path)
    packages = installed_versions(["apex"])
    facts = replace(LAPTOP, packages=packages, apex_submodules=apex_submodules(), apex_extensions=APEX_EXTENSIONS)
    finding = checks.check_apex(facts)
    assert facts.apex_submodules == submodules
    assert finding.status == status
    assert "0.9.10.dev0" in finding.found


def test_table_shows_remedies_and_colours_only_where_asked() -> None:
    findings = {"packages": [Finding("torch", "problem", "missing", "install it"), Finding("triton", "ok", "3.6.0")]}
    plain = table(findings, is_coloured=False)
    assert plain == "packages\n  problem  torch   missing\n                   -> install it\n  ok       triton  3.6.0"
    assert "\033[31mproblem\033[0m" in table(findings, is_coloured=True)


def run_doctor(*arguments: str, site_packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    before = "" if site_packages is None else f"import sys; sys.path.insert(0, {str(site_packages)!r}); "
    code = f"{before}import sys; from megavlm.cli import main; sys.exit(main(['doctor', *{arguments!r}]))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_console_reports_this_machine() -> None:
    done = run_doctor()
    assert done.returncode in (0, 1), done.stderr
    assert "\033" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("This machine runs: ")


def test_the_console_prints_json_and_fails_with_the_wrong_apex(tmp_path: Path) -> None:
    make_apex(tmp_path)
    done = run_doctor("--json", site_packages=tmp_path)
    answer = json.loads(done.stdout)
    found = {finding["name"]: finding for group in answer["findings"].values() for finding in group}
    assert done.returncode == 1
    assert answer["can_train"] is False
    assert found["apex"]["status"] == "problem"
    assert found["torch"]["found"].startswith(installed_versions(["torch"])["torch"])
