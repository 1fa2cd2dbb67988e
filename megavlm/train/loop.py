"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from megavlm import ranges
from megavlm.build.model import Model
from megavlm.build.run_config import RunConfig
from megavlm.checkpoint.lock import held
from megavlm.errors import MegavlmError
from megavlm.log import get_logger
from megavlm.parallel.groups import Groups
from megavlm.parallel.wrap import gather_parameters
from megavlm.train.callbacks import build_callbacks
from megavlm.train.callbacks.chain import Chain
from megavlm.train.evaluation import Evaluation
from megavlm.train.feed import FedStep, feed
from megavlm.train.finite import FiniteCheck
from megavlm.train.progress import Progress
from megavlm.train.report import RunStart
from megavlm.train.stopping import Stopping
from megavlm.train.training import build_training

logger = get_logger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Where a run ended."""

    model: Model
    """This process's part."""
    iteration: int
    """The last step that was done."""
    stopped: str | None
    """Why it ended before its last step: a signal's name, or an option; None: it is complete."""


def train(run: RunConfig, groups: Groups) -> Outcome:
    """Train as the run says, from its latest checkpoint on; what was trained is saved when this returns."""
    with held(run.checkpoint.save_to):
        return _train(run, groups)


def _train(run: RunConfig, groups: Groups) -> Outcome:
    stopping = Stopping(run.train, groups)
    training = build_training(run, groups)
    iteration = done = training.checkpointing.resume()
    chain = Chain(build_callbacks(run, groups))
    stopped = stopping.agreed()
    try:
        chain.start(RunStart(run=run, groups=groups, model=training.model, first_iteration=done + 1))
        evaluation = Evaluation(training, stopping)
        progress, finite = Progress(run), FiniteCheck(run.train, groups)
        if not stopped and evaluation.lacks(done):
            stopped = _evaluate(evaluation, chain, done)
        for waited, step in timed(feed(run, training.model, groups, done)) if not stopped else ():
            iteration = step.iteration
            chain.before_step(iteration)
            rates = training.learning_rates()
            result = training.step(step, stopping.wanted())
            chain.after_step(progress.report(step, result, rates, waited))
            finite.after_step(step, result)
            blocked = training.checkpointing.after_step(iteration)
            if blocked is not None:
                chain.saved(iteration, blocked)
            stopped = stopping.reason(result.stop)
            if not stopped:
                stopped = _evaluate(evaluation, chain, iteration) or stopping.behind(iteration)
            if stopped:
                break
            progress.next_step()
        blocked = training.checkpointing.finish(iteration) if iteration > done or not stopped else None
        if blocked is not None:
            chain.saved(iteration, blocked)
    except MegavlmError as error:
        if error.printed_by_rank is not None:  # all ranks have met it
            training.checkpointing.wait()
        raise
    finally:
        chain.end(iteration)
    gather_parameters(training.chunks)
    if iteration > done:
        training.checkpointing.check_frozen()
    if iteration >= run.train.train_iters and not evaluation.lacks(iteration):
        return Outcome(training.model, iteration, None)
    logger.info("stopped behind step %d of %d: %s", iteration, run.train.train_iters, stopped)
    return Outcome(training.model, iteration, stopped)


def _evaluate(evaluation: Evaluation, chain: Chain, iteration: int) -> str | None:
    """If it is time; why the run is to stop, if it was asked to meanwhile."""
    losses, stopped = evaluation.after_step(iteration)
    if losses is not None:
        chain.evaluated(iteration, losses)
    return stopped


def timed(steps: Iterator[FedStep]) -> Iterator[tuple[float, FedStep]]:
    """Each step, and for how many seconds it was waited for."""
    while True:
        began = time.perf_counter()
        with ranges.named("data"):
            step = next(steps, None)
        if step is None:
            return
        yield time.perf_counter() - began, step
