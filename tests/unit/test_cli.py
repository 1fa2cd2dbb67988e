"""The console script: its help is light, its mistakes are one line, its exit codes are right."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megavlm import __version__, cli
from megavlm.errors import ConfigError


def run_console(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megavlm", *arguments], capture_output=True, text=True, timeout=180, check=False
    )


def test_help_lists_every_command() -> None:
    done = run_console("--help")
    assert done.returncode == 0
    for name, (line, _) in cli.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert line in done.stdout


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out == cli.help_text() + "\n"


def test_version() -> None:
    assert run_console("--version").stdout == f"megavlm {__version__}\n"


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys; from megavlm import cli; cli.main(['--help']); print(sorted({'torch', 'numpy'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_unknown_command_names_the_nearest() -> None:
    done = run_console("docter")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "megavlm: error: command = 'docter': no such command; "
        "did you mean `megavlm doctor`? (`megavlm --help` lists them)\n"
    )


def test_command_like_no_other_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["xyz"]) == 2
    commands = "recipes, plan, train, data, import-hf, export-hf, verify-hf, generate, bench, doctor"
    assert f"use one of {commands}" in capsys.readouterr().err


def test_interrupt_and_error_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[BaseException] = [KeyboardInterrupt(), ConfigError("train.lr", -1, "is negative", "use 1e-4")]

    def fail(arguments: object) -> int:
        raise raised.pop(0)

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main(["any"]) == 130
    assert cli.main(["any"]) == 2
    assert capsys.readouterr().err == "megavlm: error: train.lr = -1: is negative; use 1e-4\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    done = run_console(name, "--help")
    assert done.returncode == 0
    assert f"megavlm {name}" in done.stdout
