"""What the CPU adapter costs plain torch code: a loop of small operations with the adapter and without it.

The adapter cannot be taken out again, so each side is a process of its own. Both are forked from one that has imported
megatron-core: only the adapter differs. Each waits for the word to run one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

import torch

from megavlm.bench.harness import THREADS, Comparison, Pass, Side, SkippedError, timed
from megavlm.bench.processes import fresh
from megavlm.platform import machine

TARGET = 1.03


@contextmanager
def adapter(quick: bool) -> Iterator[Comparison]:
    """The two processes, ended when the comparison is done."""
    if torch.cuda.is_available():
        raise SkippedError("a machine with CUDA runs without the adapter")
    repeats = 20 if quick else 100
    with ExitStack() as processes:
        yield Comparison(
            benchmark="adapter",
            case=f"{repeats} times factories, views, additions, a 16 x 16 product and its backward, in plain torch",
            ours=Side("with adapter", processes.enter_context(_process(True, repeats))),
            theirs=Side("without", processes.enter_context(_process(False, repeats))),
            target=TARGET,
            # Short passes and many: a burst of other work on the machine then spoils few pairs.
            rounds=5 if quick else 400,
            warmup=2 if quick else 40,
        )


def small_operations(repeats: int) -> float:
    """Operations so small that the calls cost more than the arithmetic: where a hook in each call would show."""
    weight = torch.eye(16, requires_grad=True)
    loss = torch.zeros(())
    for _ in range(repeats):
        rows = torch.arange(64, dtype=torch.float32).view(4, 16) / 64
        hidden = (rows + torch.tensor([0.25] * 16)) @ weight + torch.zeros(16)
        weights = torch.empty(8, 8).fill_(0.5)
        loss = (hidden.transpose(0, 1).reshape(8, 8).relu() * weights + torch.ones(8, 8)).mean()
        (gradient,) = torch.autograd.grad(loss, [weight])
        weight = (weight - 0.01 * gradient).detach().requires_grad_()
    return loss.item()


@contextmanager
def _process(with_adapter: bool, repeats: int) -> Iterator[Callable[[], Pass]]:
    """A process of one side; what it gives runs one pass there."""
    context = fresh()
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, with_adapter, repeats), daemon=True)
    process.start()
    theirs.close()

    def run() -> Pass:
        ours.send(None)
        result = ours.recv()
        assert isinstance(result, Pass)
        return result

    try:
        yield run
    finally:
        ours.close()
        process.join()


def _serve(pipe: Connection, with_adapter: bool, repeats: int) -> None:
    """Run a pass each time the other end asks, until it is closed."""
    torch.set_num_threads(THREADS)
    if with_adapter:
        machine.prepare()
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(timed(lambda: small_operations(repeats)))
