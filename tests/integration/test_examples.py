"""The launch scripts: bash and Python at once, started either way, each going on from what the one before it left."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megavlm.checkpoint.shelf import steps_saved
from megavlm.errors import CheckpointError, ConfigError, DataError
from megavlm.example_runs import train_command

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.sh") if path.name != "launch.sh")
BATCH = sorted(EXAMPLES.glob("slurm/*"))


def test_there_are_scripts_for_every_stage() -> None:
    stages = ["finetune_infimm", "multitask_infimm", "pretrain_infimm", "train_aquila_vl"]
    assert [f"{stage}.sh" for stage in stages] == SCRIPTS
    assert [path.name for path in BATCH] == sorted([*(f"{stage}.sbatch" for stage in stages), "job.sh"])


@pytest.mark.parametrize("file", [*(EXAMPLES / name for name in (*SCRIPTS, "launch.sh")), *BATCH], ids=lambda f: f.name)
def test_scripts_are_valid_bash(file: Path) -> None:
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_python(script: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = compile((EXAMPLES / script).read_text(), script, "exec")
    # Imported (as spawned processes do), it runs nothing.
    exec_names = {name for name in code.co_names if not name.startswith("__")}
    assert exec_names == {"sys", "megavlm.scripts", "run_script", "exit", "argv"}
    assert os.access(EXAMPLES / script, os.X_OK)


# --- what they run --------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(model: str, stage: str, data: Path) -> None:
    """Data sets that look prepared, as far as a look at their names goes."""
    from megavlm.data.index import DATASET_FILE
    from megavlm.recipes import recipe

    settings = recipe(f"{model}/{stage}").data
    assert settings is not None
    for source in (source for stream in settings.streams for source in stream.sources):
        (data / source.name / DATASET_FILE).parent.mkdir(parents=True, exist_ok=True)
        (data / source.name / DATASET_FILE).touch()


def test_without_data_the_command_that_prepares_them_is_named(here: Path) -> None:
    with pytest.raises(DataError, match="megavlm data prepare SOURCE... --out data/"):
        train_command("infimm", "pretrain", [], is_first=True)
    with pytest.raises(DataError, match="--out elsewhere/"):
        train_command("aquila-vl", None, ["--data-path=elsewhere"], is_first=True)


def test_without_weights_the_command_that_makes_them_is_named(here: Path) -> None:
    prepared("infimm-zephyr-7b", "pretrain", here / "data")
    asked = ["--model", "zephyr-7b", "--train-iters", "5"]
    with pytest.raises(ConfigError, match="megavlm import-hf"):
        train_command("infimm", "pretrain", asked, is_first=True)
    command = train_command("infimm", "pretrain", [*asked, "--load-hf", "hf"], is_first=True)
    assert command[0] == "infimm-zephyr-7b/pretrain"
    assert command[command.index("--save") + 1] == "runs/infimm-zephyr-7b/pretrain"
    assert command[-4:] == ["--train-iters", "5", "--load-hf", "hf"], "the user's own words come last, and win"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--model", "llama2"], "did you mean llama2-13b"), (["--tiny", "--model", "zephyr-7b"], "leave one out")],
)
def test_an_unknown_model_is_refused(words: list[str], message: str, here: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_command("infimm", "pretrain", words, is_first=True)


# --- running them ---------------------------------------------------------------------------------------------------


def start(script: str, *options: str, by: str, folder: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NPROC": str(processes), "PYTHON": sys.executable, "PYTHONSAFEPATH": "1"}
    launch = ["bash"]
    if by == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, str(EXAMPLES / script), *options]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)


def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = start("pretrain_infimm.sh", by="bash", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("megavlm: error: ") == 1 and "megavlm data prepare" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_script_trains_a_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways of starting them; the stages of InfiMM go on from one another."""
    small = ["--tiny", "--train-iters", "1", "--log-interval", "1"]
    chain = [
        ("pretrain_infimm.sh", "bash", 2, "iteration        1/       1"),
        ("multitask_infimm.sh", "torchrun", 1, "starting from the weights of runs/infimm-tiny/pretrain/iter_0000001"),
        ("finetune_infimm.sh", "bash", 1, "starting from the weights of runs/infimm-tiny/multitask/iter_0000001"),
    ]
    for script, by, processes, words in chain:
        done = start(script, *small, by=by, folder=tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        assert steps_saved(tmp_path / "runs" / "infimm-tiny" / script.partition("_")[0]) == [1]
    record = tmp_path / "runs" / "infimm-tiny" / "pretrain" / "iter_0000001" / "run.json"
    record.write_text(record.read_text().replace('"train_iters": 1', '"train_iters": 3'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="has come to step 1 of 3.*with --pretrained-checkpoint runs/infimm-tiny"):
        train_command("infimm", "multitask", ["--tiny"], is_first=False)
    own = ["--tiny", "--pretrained-checkpoint", "runs/infimm-tiny/pretrain"]
    assert train_command("infimm", "multitask", own, is_first=False)[-2:] == own[1:]

    done = start("train_aquila_vl.sh", *small, "--stages", "1,2a", by="torchrun", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "stage  steps  state  starts from" in done.stdout
    assert "starting from the weights of runs/aquila-vl-tiny/1/iter_0000001" in done.stdout
    assert steps_saved(tmp_path / "runs" / "aquila-vl-tiny" / "2a") == [1]
