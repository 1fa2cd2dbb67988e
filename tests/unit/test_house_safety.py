"""No call that runs code hidden in data: pickles, `eval`, `yaml.load`, shells, remote code."""

from __future__ import annotations

import ast

import pytest
from python_source import dotted, imported_names, package_name, python_files, relative

PICKLES = ("pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve")
FORBIDDEN_CALLS = {
    "eval": "ast.literal_eval reads values",
    "exec": "import the module instead",
    "builtins.eval": "ast.literal_eval reads values",
    "builtins.exec": "import the module instead",
    "os.system": "use subprocess.run with a list",
    "os.popen": "use subprocess.run with a list",
    "subprocess.getoutput": "use subprocess.run with a list",
    "subprocess.getstatusoutput": "use subprocess.run with a list",
    "yaml.load": "use yaml.safe_load",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.full_load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
}
FORBIDDEN_KEYWORDS = {
    "shell": "use a list of arguments",
    "trust_remote_code": "pass on what the caller said, never True by itself",
    "allow_pickle": "arrays need no pickle",
}

EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "megavlm/testing.py": ("pickle",),  # between a test and the ranks it forked
    "megavlm/checkpoint/restricted_pickle.py": ("pickle",),  # the place that refuses what is on no list
    "megavlm/toy/quiz.py": ("trust_remote_code",),  # of the folder that the quickstart has exported just before
}
"""Module -> the rules (`pickle`, `torch.load`, a call or a keyword from above) that it may break, with a comment that
says why it is safe there."""
EXCEPTIONS_OF_TESTS = ("pickle", "trust_remote_code")
"""Tests make hostile files on purpose."""

SOURCES = python_files("megavlm", "kernels", "tools", "examples", "tests")


def dangers(source: str, path: str) -> list[tuple[str, str]]:
    """(rule, line that says where and what instead) for each dangerous import or call, exceptions left out."""
    tree = ast.parse(source, filename=path)
    names = imported_names(tree, package_name(path))
    allowed = EXCEPTIONS_OF_TESTS if path.startswith("tests/") else EXCEPTIONS.get(path, ())
    found = [
        (node.lineno, rule, remedy)
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.expr)
        for rule, remedy in (*_import_dangers(node), *_call_dangers(node, names))
    ]
    return [(rule, f"{path}:{line}: {rule}: {remedy}") for line, rule, remedy in found if rule not in allowed]


def _import_dangers(node: ast.AST) -> list[tuple[str, str]]:
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    return [("pickle", "use safetensors or JSON") for module in modules if module.split(".")[0] in PICKLES]


def _call_dangers(node: ast.AST, names: dict[str, str]) -> list[tuple[str, str]]:
    if not isinstance(node, ast.Call):
        return []
    found = []
    called = dotted(node.func, names)
    if called in FORBIDDEN_CALLS:
        found.append((called, FORBIDDEN_CALLS[called]))
    true_keywords = {
        keyword.arg
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Constant) and keyword.value.value is True
    }
    if called == "torch.load" and "weights_only" not in true_keywords:
        found.append(("torch.load", "say weights_only=True"))
    return found + [(word, remedy) for word, remedy in FORBIDDEN_KEYWORDS.items() if word in true_keywords]


def test_no_source_runs_code_hidden_in_data() -> None:
    assert SOURCES
    found = [line for path in SOURCES for _, line in dangers(path.read_text(encoding="utf-8"), relative(path))]
    assert not found, "\n" + "\n".join(found)


def test_listed_exceptions_exist() -> None:
    assert EXCEPTIONS.keys() <= {relative(path) for path in SOURCES}


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch as t\nt.load('x', weights_only=False)", "torch.load"),
        ("from torch import load\nload('x')", "torch.load"),
        ("eval('1')", "eval"),
        ("exec('1')", "exec"),
        ("import yaml\nyaml.load('a')", "yaml.load"),
        ("import os\nos.system('ls')", "os.system"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell"),
        ("f(trust_remote_code=True)", "trust_remote_code"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
    ],
)
def test_a_dangerous_call_is_found(source: str, rule: str) -> None:
    ((found, line),) = dangers(source, "megavlm/data/read.py")
    assert found == rule
    assert line.startswith("megavlm/data/read.py:")


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x', weights_only=True, mmap=True)",
        "model.eval()",
        "import yaml\nyaml.safe_load('a')",
        "import subprocess\nsubprocess.run(['ls'])",
        "f(trust_remote_code=trusted)",
    ],
)
def test_a_safe_call_passes(source: str) -> None:
    assert dangers(source, "megavlm/data/read.py") == []
