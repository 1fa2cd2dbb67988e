"""The batch scripts on a real Slurm of two nodes: asked to stop they save, wait in the queue, and go on."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, slurm_cluster, why_not

from megavlm.checkpoint.shelf import latest_step
from megavlm.data.ledger import check_ledger, order_of_ledger

ROOT = Path(__file__).parents[2]
STEPS = 20
SCRIPTS = sorted(path.name for path in (ROOT / "examples" / "slurm").glob("*.sbatch"))

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no Slurm here: {why_not()}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(cluster: Cluster, script: str, *options: str, log: Path) -> str:
    """A job on both nodes, one process each, on the machine's CPU; its number."""
    here = {"MEGAVLM": str(log.parent), "PYTHON": sys.executable, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    asked = ["--nodes=2", "--gres=none", "--cpus-per-task=1", "--mem=100", f"--output={log}", f"--chdir={log.parent}"]
    file = str(ROOT / "examples" / "slurm" / script)
    return cluster.call("sbatch", "--parsable", *asked, file, *options, **here)


def wait_for(what: str, cluster: Cluster, log: Path, job: str, seconds: float = 600) -> None:
    """Until the job is in the state, or its log has the words."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = cluster.state(job)["JobState"]
        text = log.read_text() if log.exists() else ""
        if state == what or what in text:
            return
        assert state not in ("FAILED", "TIMEOUT", "CANCELLED", "COMPLETED"), f"{state}\n{text[-3000:]}"
        time.sleep(0.2)
    raise AssertionError(f"no {what} within {seconds} s\n{text[-3000:]}\n{cluster.said()}")


def hurry(cluster: Cluster, job: str) -> None:
    """A job that was put back waits for two minutes; started in the second of its end it would be taken for dead."""
    time.sleep(2.5)
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")


SLOWLY = """
import time
from megavlm.checkpoint import manager
quickly = manager.write_shards
def slowly(*arguments):
    time.sleep({seconds})
    return quickly(*arguments)
manager.write_shards = slowly
"""


CRASHES_WHEN_ASKED = """
import os
from megavlm.train.stopping import Stopping
reason = Stopping.reason
def crashes(self, agreed):
    if agreed:
        os.abort()
    return reason(self, agreed)
Stopping.reason = crashes
"""


def examples_with(code: str, folder: Path) -> None:
    """A copy of the scripts, one of which begins with this."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    script = folder / "examples" / "pretrain_infimm.sh"
    script.write_text(script.read_text().replace("import sys\n", f"import sys\n{code}"))


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.full)])
def test_a_job_that_is_asked_to_stop_goes_on_where_it_was(seconds: int, cluster: Cluster, tmp_path: Path) -> None:
    examples_with(SLOWLY.format(seconds=seconds), tmp_path)
    log, save = tmp_path / "job.log", tmp_path / "save"
    small = ["--train-iters", str(STEPS), "--log-interval", "1", "data.rows.max_tokens=512"]
    job = submit(cluster, "pretrain_infimm.sbatch", "--tiny", "--save", str(save), *small, log=log)
    # The first signal reaches the nodes, the second one, as ahead of the end of the time, the script alone.
    for stops, how in enumerate((["--signal=USR1"], ["--signal=USR1", "--batch"])):
        done = latest_step(save) or 0
        wait_for(f"iteration {done + 2:8d}/", cluster, log, job)
        cluster.call("scancel", *how, job)
        wait_for("PENDING", cluster, log, job)
        assert cluster.state(job)["Restarts"] == str(stops + 1)
        assert done < (latest_step(save) or 0) < STEPS
        hurry(cluster, job)
        wait_for("RUNNING", cluster, log, job)
    wait_for("COMPLETED", cluster, log, job)
    assert latest_step(save) == STEPS
    ledger = save / "ledger"
    report = check_ledger(ledger, order_of_ledger(ledger, str(tmp_path / "runs" / "tiny" / "infimm" / "data")))
    assert (report.steps, report.wrong) == (STEPS, [])
    assert len(list(ledger.glob("rank-*.jsonl"))) == 2


def test_a_job_that_crashes_when_it_is_asked_to_stop_fails(cluster: Cluster, tmp_path: Path) -> None:
    examples_with(CRASHES_WHEN_ASKED, tmp_path)
    log = tmp_path / "job.log"
    small = ["--train-iters", str(STEPS), "--log-interval", "1", "data.rows.max_tokens=512"]
    job = submit(cluster, "pretrain_infimm.sbatch", "--tiny", *small, log=log)
    wait_for(f"iteration {2:8d}/", cluster, log, job)
    cluster.call("scancel", "--signal=USR1", "--batch", job)
    wait_for("FAILED", cluster, log, job)
    assert cluster.state(job)["Restarts"] == "0"
    assert "processes ended without having saved" in log.read_text()


def test_a_job_with_a_mistake_fails_once(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    log = tmp_path / "job.log"
    job = submit(cluster, "train_aquila_vl.sbatch", "--tiny", "--save-intervall", "3", log=log)
    wait_for("FAILED", cluster, log, job)
    state = cluster.state(job)
    assert (state["ExitCode"], state["Restarts"]) == ("2:0", "0")
    assert "did you mean --save-interval" in log.read_text()


SAYS_WHAT_IT_HAS = """
set -- {folder}/say.sh
source {examples}/slurm/job.sh
"""


def test_the_processes_of_a_node_get_all_of_its_cpus(cluster: Cluster, tmp_path: Path) -> None:
    """`srun` alone would give each node's launcher one."""
    (tmp_path / "say.sh").write_text('scontrol --oneliner show step "$SLURM_JOB_ID.$SLURM_STEP_ID"\n')
    script, log = tmp_path / "job.sbatch", tmp_path / "job.log"
    script.write_text("#!/bin/bash\n" + SAYS_WHAT_IT_HAS.format(folder=tmp_path, examples=ROOT / "examples"))
    asked = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=100", f"--output={log}"]
    job = cluster.call("sbatch", "--parsable", *asked, f"--chdir={tmp_path}", str(script), MEGAVLM=str(tmp_path))
    wait_for("COMPLETED", cluster, log, job)
    said = dict(word.split("=", 1) for word in log.read_text().split() if "=" in word)
    assert (said["Nodes"], said["Tasks"], said["CPUs"]) == ("2", "2", "4")


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_takes_every_script(script: str, cluster: Cluster) -> None:
    asked = ["--nodes=2", "--gres=none", "--cpus-per-task=1"]
    cluster.call("sbatch", "--test-only", *asked, str(ROOT / "examples" / "slurm" / script))
