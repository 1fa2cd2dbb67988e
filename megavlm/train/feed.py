"""What a run is fed: the batches of each step, from prepared data or from the toy text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavlm.batch import TextBatch
from megavlm.build.loader import build_loader
from megavlm.build.model import Model
from megavlm.build.run_config import RunConfig
from megavlm.data.ledger import LedgerWriter
from megavlm.data.loader import Loader, StepBatches
from megavlm.data.toy_text import toy_step
from megavlm.errors import DataError
from megavlm.log import get_logger
from megavlm.parallel.groups import Groups
from megavlm.train.report import StepWork
from megavlm.train.settle import settle
from megavlm.train.work import work_of_plan, work_of_rows

logger = get_logger(__name__)


@dataclass(frozen=True)
class FedStep:
    """A step's data on one process."""

    iteration: int
    """Counted from 1."""
    batches: list[TextBatch]
    """This data-parallel rank's microbatches, on the process's device."""
    work: StepWork
    """The global batch in numbers; its target tokens are counted with the loss."""


def feed(run: RunConfig, model: Model, groups: Groups, done: int, ledger: Path | None = None) -> Iterator[FedStep]:
    """The steps behind those that are done.

    A run that saves checkpoints keeps its ledger beside them, where no other folder is given.
    """
    if ledger is None and run.checkpoint.save_to is not None:
        ledger = Path(run.checkpoint.save_to) / "ledger"
    steps = _toy(run, groups, done) if run.data is None else _prepared(run, model, groups, done, ledger)
    for iteration, (batches, work) in enumerate(steps, done + 1):
        yield FedStep(iteration, [batch.to(groups.device) for batch in batches], work)


def _toy(run: RunConfig, groups: Groups, first: int) -> Iterator[tuple[list[TextBatch], StepWork]]:
    rows, length = run.train.global_batch_size, run.train.seq_length
    work = work_of_rows(rows, length)
    for step in range(first, run.train.train_iters):
        batches = toy_step(
            seed=run.train.seed,
            step=step,
            global_batch_size=rows,
            micro_batch_size=run.train.micro_batch_size,
            seq_length=length,
            vocab_size=run.decoder.vocab_size,
            data_rank=groups.data_rank,
            data_size=groups.data_size,
        )
        yield batches, work


def _prepared(
    run: RunConfig, model: Model, groups: Groups, first: int, ledger: Path | None
) -> Iterator[tuple[list[TextBatch], StepWork]]:
    assert run.data is not None
    loader = build_loader(run, model, groups)
    weights = [stream.loss_weight for stream in run.data.streams]
    writer = None
    if ledger is not None and groups.is_last_stage and groups.tensor_rank == 0:
        settings = {"data": run.data.to_dict(), "seed": run.train.seed}
        writer = LedgerWriter(ledger, groups.data_rank, settings, first)
    names = [source.name for source in loader.sources]
    damaged = samples = 0
    for found in loader.steps(first, run.train.train_iters):
        batches, of_step = settle(found, groups, weights)
        if writer is not None:
            writer.write(found, _consumed(found, loader), of_step, names)
        damaged, samples = damaged + len(of_step), samples + sum(map(len, found.samples))
        for one in of_step:
            logger.warning("sample %d of %s is left out: %s", one.sample.index, one.sample.source, one.problem)
        _refuse_too_much(damaged, samples, run.data.most_damaged, run.data.samples_per_step)
        yield batches, work_of_plan(found.plan)


def _consumed(found: StepBatches, loader: Loader) -> np.ndarray:
    """The places in the step of all samples of this data-parallel rank's rows, those left out included."""
    rows = loader.planner.rows_dealt(found.plan, loader.data_rank, loader.data_size)
    return np.flatnonzero(np.isin(found.plan.packing.row_of, rows))


def _refuse_too_much(damaged: int, samples: int, most: float, at_least: int) -> None:
    """Stop a run whose data are broken; not for a single sample of the first steps."""
    if damaged > most * max(samples, at_least) and damaged > 1:
        raise DataError(
            "damaged samples",
            damaged,
            f"of {samples} are more than {most:.2%}",
            "run `megavlm data lint` on the data sets named above, or raise --max-damaged-fraction",
        )
