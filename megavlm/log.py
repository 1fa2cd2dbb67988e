"""A rank-aware logger, and the line of a training iteration in Megatron's own words.

Plain `logging` underneath: what is below a warning goes to standard output from rank 0 only, warnings and errors go
to standard error from every rank, marked with it.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

_ROOT = "megavlm"


@dataclass(frozen=True, kw_only=True)
class IterationStats:
    """What one line of the training log says; times in milliseconds, losses by name, as in {"lm loss": 2.3}."""

    iteration: int
    train_iters: int
    consumed_samples: int
    elapsed_time_per_iteration_ms: float
    learning_rate: float
    global_batch_size: int
    losses: Mapping[str, float]
    grad_norm: float
    loss_scale: float = 1.0
    skipped_iterations: int = 0
    nan_iterations: int = 0
    throughput: Mapping[str, float] = field(default_factory=dict)
    """Figures of speed by their words, `THROUGHPUT` first; none: the line has none."""


THROUGHPUT = "throughput per GPU (TFLOP/s/GPU)"
"""Megatron's words for it."""


def iteration_line(stats: IterationStats, now: datetime) -> str:
    """The line as Megatron-LM writes it, to the space: existing greps and dashboards read it."""
    fields = [
        f"iteration {stats.iteration:8d}/{stats.train_iters:8d}",
        f"consumed samples: {stats.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {stats.elapsed_time_per_iteration_ms:.1f}",
        *(f"{name}: {_speed(figure)}" for name, figure in stats.throughput.items()),
        f"learning rate: {stats.learning_rate:.6E}",
        f"global batch size: {stats.global_batch_size:5d}",
        *(f"{name}: {loss:.6E}" for name, loss in stats.losses.items()),
        f"loss scale: {stats.loss_scale:.1f}",
        f"grad norm: {stats.grad_norm:.3f}",
        f"number of skipped iterations: {stats.skipped_iterations:3d}",
        f"number of nan iterations: {stats.nan_iterations:3d}",
    ]
    return f" [{now:%Y-%m-%d %H:%M:%S}] {' | '.join(fields)} |"


def _speed(figure: float) -> str:
    """As Megatron writes it; a laptop's TFLOP/s need more places to be seen."""
    return f"{figure:.1f}" if figure >= 1 or figure == 0 else f"{figure:.4f}"


def validation_line(iteration: int, losses: Mapping[str, float]) -> str:
    """What Megatron-LM says of an evaluation, to the space."""
    fields = [f" validation loss at iteration {iteration}"]
    for name, loss in losses.items():
        fields += [f"{name} value: {loss:.6E}", f"{name} PPL: {math.exp(min(20, loss)):.6E}"]
    return " | ".join(fields) + " | "


def log_validation(iteration: int, losses: Mapping[str, float]) -> None:
    """Print that line between two of dashes, from the rank that calls."""
    line = validation_line(iteration, losses)
    for text in ("-" * (len(line) + 1), line, "-" * (len(line) + 1)):
        get_logger(__name__).info("%s", text, extra={"from_any_rank": True})


def log_iteration(stats: IterationStats) -> None:
    """Print the line from the rank that calls, whichever it is: the rank that has the loss need not be rank 0."""
    get_logger(__name__).info("%s", iteration_line(stats, datetime.now()), extra={"from_any_rank": True})


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; names outside the package (`__main__`) are put below it, to share its handlers."""
    return logging.getLogger(name if name.partition(".")[0] == _ROOT else f"{_ROOT}.{name}")


def setup_logging(rank: int, world_size: int, level: int = logging.INFO) -> None:
    """Send this process's log to its streams; called again, it replaces what it set up before."""
    assert 0 <= rank < world_size, (rank, world_size)
    output = logging.StreamHandler(sys.stdout)  # flushes after each record
    output.addFilter(lambda record: record.levelno < logging.WARNING)
    output.addFilter(lambda record: rank == 0 or hasattr(record, "from_any_rank"))
    output.setFormatter(logging.Formatter("%(message)s"))
    errors = logging.StreamHandler(sys.stderr)
    errors.setLevel(logging.WARNING)
    errors.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [output, errors]
    root.setLevel(level)
    root.propagate = False  # a root handler of another library would print every line again


def quiet_third_parties() -> None:
    """Keep from the user what other packages say to developers; `megavlm doctor` says what is missing here.

    megatron-core warns on import of each fused part that is not installed, torch of renamed collectives, and the RNG
    tracker says at each layer that the CPU generator moved, which on a CPU is what it is for. transformers warns of a
    model type that it does not know when it reads no more than the tokenizer beside it.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\b")
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
