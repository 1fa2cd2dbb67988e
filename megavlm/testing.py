"""For tests only: run a function on several ranks, and judge how equal two results are.

Ranks are forked from a server process that has torch, megatron-core and this package imported already: once that is
up, four ranks start, join and end in 0.1 s, where one fresh interpreter takes 4 s for its imports.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PRELOADED = ["torch", "transformers", "megavlm.train.loop", "megavlm.export.hf_export"]
_PR_SET_PDEATHSIG = 1


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time: `rank`, and `error` where it raised."""

    def __init__(self, rank: int, problem: str, error: BaseException | None = None) -> None:
        super().__init__(f"rank {rank} {problem}")
        self.rank, self.error = rank, error


def spawn(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*arguments)` on `world_size` ranks that can find each other; return what each returned.

    The environment is torchrun's. The first rank to fail ends them all, and so does the time; whatever happens, no
    process is left when this returns.
    """
    # Held here, the store needs no port picked in advance, and no rank has to outlive another to serve it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    ranks: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, store.port)
            process: BaseProcess = context.Process(
                target=_rank_main, args=(theirs, environment, _reference(function), pickle.dumps(arguments))
            )
            process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        return _collect(pipes, ranks, time.monotonic() + timeout, timeout)
    finally:
        for process in ranks:
            _end(process)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # As under torchrun: the store exists already, so rank 0 connects to it like the others.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _collect(pipes: list[Connection], ranks: list[BaseProcess], deadline: float, timeout: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0.0))
        if not ready:
            late = sorted(waiting.values())
            raise RankFailed(late[0], f"was not done after {timeout:g} s (still running: {late})")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                returned, problem, error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join(5)
                raise RankFailed(rank, f"died with exit code {ranks[rank].exitcode}") from None
            if problem:
                _refuse_dead(ranks)
                raise RankFailed(rank, f"failed:\n{problem}", error)
            results[rank] = returned
    return results


def _refuse_dead(ranks: list[BaseProcess]) -> None:
    """Name a rank that was killed, where another has failed: for want of it, most likely."""
    for rank, process in enumerate(ranks):
        process.join(0.1)
        if process.exitcode is not None and process.exitcode < 0:
            raise RankFailed(rank, f"died with exit code {process.exitcode}")


def _end(process: BaseProcess) -> None:
    """Kill the rank and everything it started: it leads a process group of its own."""
    if process.pid is not None:
        for kill in (os.killpg, os.kill):
            try:
                kill(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
    process.join()
    process.close()


def _reference(function: Callable[..., Any]) -> tuple[str, str]:
    """(file, name) of a function: a test module cannot be imported by name in another process."""
    assert "." not in function.__qualname__, f"{function.__qualname__} must be at the top of its module"
    return str(Path(sys.modules[function.__module__].__file__ or "").resolve()), function.__qualname__


def _resolve(reference: tuple[str, str]) -> Callable[..., Any]:
    file, name = reference
    spec = importlib.util.spec_from_file_location(f"spawned_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def _rank_main(pipe: Connection, environment: dict[str, str], reference: tuple[str, str], arguments: bytes) -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed test run takes its ranks along
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        # Plain pickle: multiprocessing's own would hand tensors over as open files, and run out of them.
        pipe.send_bytes(pickle.dumps((_resolve(reference)(*pickle.loads(arguments)), None, None)))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            pipe.send_bytes(pickle.dumps((None, text, error)))
        except Exception:  # an error that does not pickle: its text has to do
            pipe.send_bytes(pickle.dumps((None, text, None)))
        os._exit(1)
    # Skips the teardown of gloo's threads, which waits for ranks that may be gone.
    os._exit(0)


# --- how equality is judged (float32 on CPU) ---------------------------------------------------------------------


def assert_logits_close(mine: Tensor, reference: Tensor, tolerance: float = 1e-4) -> None:
    """Absolute, for logits of order 1."""
    assert mine.shape == reference.shape, f"{tuple(mine.shape)} against {tuple(reference.shape)}"
    worst = (mine.double() - reference.double()).abs().max().item()
    assert worst <= tolerance, f"logits differ by {worst:.2e}, allowed {tolerance:.0e}"


def assert_losses_close(mine: float, reference: float, tolerance: float = 1e-5) -> None:
    """Relative."""
    off = abs(mine - reference) / abs(reference)
    assert off <= tolerance, f"loss {mine!r} against {reference!r}: {off:.2e} relative, allowed {tolerance:.0e}"


def assert_gradients_close(
    mine: Mapping[str, Tensor], reference: Mapping[str, Tensor], tolerance: float = 1e-4
) -> None:
    """Each within `tolerance` x max(its own norm, 1e-3 x the norm of all): some are zero by construction."""
    assert mine.keys() == reference.keys(), f"only in one of them: {sorted(mine.keys() ^ reference.keys())}"
    whole = torch.stack([gradient.double().norm() for gradient in reference.values()]).norm()
    assert whole > 0, "the reference has no gradient at all"
    for name, expected in reference.items():
        assert mine[name].shape == expected.shape, f"{name}: {tuple(mine[name].shape)}, {tuple(expected.shape)}"
        off = (mine[name].double() - expected.double()).norm()
        allowed = tolerance * torch.maximum(expected.double().norm(), 1e-3 * whole)
        assert off <= allowed, f"gradient of {name} is off by {off:.2e}, allowed {allowed:.2e}"
