"""What gets installed, and that the folder `kernels` never passes for the PyPI package of that name."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from typing import Any

import pytest
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


def test_every_file_beside_the_sources_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **said: settings.update(said))
    runpy.run_path("setup.py")
    package_data = settings["package_data"]
    for base, package in ((ROOT / "megavlm", "megavlm"), (ROOT / "kernels" / "megavlm_kernels", "megavlm_kernels")):
        installed = {path for pattern in package_data[package] for path in base.glob(pattern)}
        others = {path for path in base.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert others == installed, "files that package_data of setup.py does not name, or names that match no file"


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
