"""What gets installed, and that the folder `kernels` never passes for the PyPI package of that name."""

from __future__ import annotations

import os
import subprocess
import sys

from python_source import ROOT
from setuptools import find_packages


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_folder_with_sources_is_installed() -> None:
    for parent, package in (("", "megavlm"), ("kernels", "megavlm_kernels")):
        base = ROOT / parent
        with_sources = {".".join(path.parent.relative_to(base).parts) for path in (base / package).rglob("*.py")}
        found = set(find_packages(str(base), include=[package, f"{package}.*"]))
        assert with_sources == found, f"without __init__.py: {sorted(with_sources - found)}"


def test_typing_marker_lies_in_both_packages() -> None:
    assert (ROOT / "megavlm" / "py.typed").exists()
    assert (ROOT / "kernels" / "megavlm_kernels" / "py.typed").exists()


def test_repository_root_hides_no_other_package() -> None:
    code = (
        "import importlib.util, megavlm, megavlm_kernels\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(megavlm.__file__, megavlm_kernels.__file__, [] if spec is None else [*spec.submodule_search_locations])"
    )
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=safe, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "kernels") + "'" not in done.stdout, "the folder kernels/ is importable as a package"
