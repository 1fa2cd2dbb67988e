"""A worker that is lost: the others, who wait for it in silence, end as well, on its node and on all others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LOST_WORKER = Path(__file__).parents[1] / "support" / "lost_worker.py"
SMALL = ["--train-iters", "6", "--log-interval", "1", "--global-batch-size", "8", "--micro-batch-size", "1"]
AS_LAUNCHED = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "600"]


def start(nodes: list[list[str]], lost: str, how: str, folder: Path) -> list[tuple[int, str]]:
    """The exit code of each node's launcher, and what it and its workers said."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [str(LOST_WORKER), lost, how, "train", "decoder-tiny", *SMALL]
    logs = [folder / f"node-{number}.log" for number in range(len(nodes))]
    processes = []
    try:
        for node, log in zip(nodes, logs, strict=True):
            launch = [sys.executable, "-m", "megavlm.torchrun", *AS_LAUNCHED, *node, *command]
            with log.open("w") as file:
                processes.append(subprocess.Popen(launch, env=environment, stdout=file, stderr=subprocess.STDOUT))
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("kill", "rank 1 has ended without a word"),
        ("raise", "rank 1 has failed (RuntimeError: this is all)"),
        # Not 75: what was asked to stop has not saved, and is not to be started again as if it had.
        ("stop", "SIGUSR1: 2 of this node's 2 processes ended without having saved"),
    ],
)
def test_a_lost_worker_takes_its_node_along(how: str, word: str, tmp_path: Path) -> None:
    ((code, said),) = start([["--standalone", "--nproc-per-node", "2"]], "1", how, tmp_path)
    assert code == 1
    assert f"megavlm: error: {word}" in said, said
    assert "rank 0 waited for it in vain" in said, said
    assert "Unable to shutdown process" not in said  # torchrun's own last resort, after 30 s


@pytest.mark.parametrize(
    ("lost", "word"),
    [("1", "a process of node 1 has ended before its time"), ("0", "the node of the first process is gone")],
)
def test_other_nodes_are_told(lost: str, word: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    ends = start([[*meeting, "--node-rank", str(number)] for number in range(2)], lost, "kill", tmp_path)
    assert [code for code, _ in ends] == [1, 1]
    _, said = ends[1 - int(lost)]
    assert f"megavlm: error: {word}" in said, said
