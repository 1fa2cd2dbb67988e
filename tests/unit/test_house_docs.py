"""Docstrings where a reader starts, make targets that exist, and nothing of the machine a file was written on."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest
from python_source import ROOT, python_files, relative

MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:root|home|Users|work|farm|opt/conda|tmp/w\w*)/")
MAKE_TARGET = re.compile(r"(?:^|`|\$ |&& )make ([a-z][a-z-]*)", re.MULTILINE)
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]


def tracked_files() -> list[str]:
    """Every file that is, or is about to be, part of the repository."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_every_module_opens_with_a_docstring() -> None:
    sources = python_files("megavlm", "kernels", "tools", "examples", "tests")
    assert sources
    without = [relative(path) for path in sources if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not without


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_make_targets_that_exist(path: object) -> None:
    named = set(MAKE_TARGET.findall((ROOT / str(path)).read_text(encoding="utf-8")))
    assert named <= make_targets(), f"no such target: {sorted(named - make_targets())}"


def test_make_targets_are_read_from_text() -> None:
    assert MAKE_TARGET.findall("run `make setup`, or make sure\n    $ make test-full\nmake bench\n") == [
        "setup",
        "test-full",
        "bench",
    ]


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for name in tracked_files():
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            lines = content.decode("utf-8", errors="replace").splitlines()
            found += [
                f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)
            ]
    assert not found, "\n" + "\n".join(found)


def test_machine_paths_are_recognised() -> None:
    folder = "someone"
    assert MACHINE_PATH.search(f"see /{'home'}/{folder}/run")
    assert MACHINE_PATH.search(f"'/{'root'}/x'")
    assert not MACHINE_PATH.search("https://example.org/home/page and data/work/x and /dev/shm/")
