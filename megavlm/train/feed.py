"""What a run is fed: the batches of each step, from prepared data or from the toy text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megavlm.batch import TextBatch
from megavlm.build.held_out import held_out_data
from megavlm.build.loader import build_loader
from megavlm.build.model import Model
from megavlm.build.run_config import RunConfig
from megavlm.data.ledger import SIZES, LedgerWriter
from megavlm.data.loader import Loader, StepBatches
from megavlm.data.step_plan import DataConfig, StepPlan
from megavlm.data.toy_text import toy_step
from megavlm.errors import DataError
from megavlm.log import get_logger
from megavlm.parallel.agree import agreed
from megavlm.parallel.groups import Groups
from megavlm.train.report import StepWork
from megavlm.train.settle import Settled, settle
from megavlm.train.step import Sources
from megavlm.train.work import work_of_plan, work_of_rows

logger = get_logger(__name__)

HELD_OUT_SEED = 0
"""Of the order of held-out data, whatever a run's own: so that runs can be compared."""
HELD_OUT_TOY_SEED = 2**62
"""No run may have it."""


@dataclass(frozen=True)
class FedStep:
    """A step's data on one process."""

    iteration: int
    """Counted from 1."""
    batches: list[TextBatch]
    """This data-parallel rank's microbatches."""
    work: StepWork
    """The global batch in numbers; its target tokens are counted with the loss."""
    sources: Sources | None
    """Which source each token is of; None where there is but one."""
    rows: list[list[str]]
    """The samples of each microbatch, as `source:index`."""
    samples: Callable[[], list[str]]
    """Those of the global batch."""


def feed(run: RunConfig, model: Model, groups: Groups, done: int, ledger: Path | None = None) -> Iterator[FedStep]:
    """The steps behind those that are done, on this process's device.

    A run that saves checkpoints keeps its ledger beside them, where no other folder is given.
    """
    if run.data is None:
        yield from _toy(run, groups, range(done, run.train.train_iters), run.train.seed)
        return
    if ledger is None and run.checkpoint.save_to is not None:
        ledger = Path(run.checkpoint.save_to) / "ledger"
    yield from _prepared(run, run.data, model, groups, done, ledger)


def held_out(run: RunConfig, model: Model, groups: Groups) -> Callable[[], Iterator[FedStep]]:
    """The batches of each evaluation: the same ones every time, on which nothing is trained."""
    steps = range(run.train.eval_iters)
    if run.data is None:
        return partial(_toy, run, groups, steps, HELD_OUT_TOY_SEED)
    if run.data.valid_path is None:
        return lambda: iter(())
    data = held_out_data(run.data)
    run = run.replace(data=data, train=run.train.replace(seed=HELD_OUT_SEED, eval_interval=None))
    return partial(_read, build_loader(run, model, groups), data, groups, steps)


def _read(loader: Loader, data: DataConfig, groups: Groups, steps: range) -> Iterator[FedStep]:
    """Prepared data without a ledger: a sample that cannot be read is left out, and nothing comes of it."""
    names, weights = names_and_weights(loader, data)
    for found in loader.steps(steps.start, steps.stop):
        yield _fed(found, settle(found, groups, weights, names), data, names, groups)


def _toy(run: RunConfig, groups: Groups, steps: range, seed: int) -> Iterator[FedStep]:
    rows, length, at_once = run.samples_per_step, run.row_tokens, run.train.micro_batch_size
    work = work_of_rows(rows, length)
    mine = [f"toy text:{row}" for row in range(groups.data_rank, rows, groups.data_size)]
    names = [mine[first : first + at_once] for first in range(0, len(mine), at_once)]
    for step in steps:
        batches = toy_step(
            seed=seed,
            step=step,
            global_batch_size=rows,
            micro_batch_size=at_once,
            seq_length=length,
            vocab_size=run.decoder.vocab_size,
            data_rank=groups.data_rank,
            data_size=groups.data_size,
        )
        on_device = [batch.to(groups.device) for batch in batches]
        yield FedStep(step + 1, on_device, work, None, names, lambda: [f"toy text:{row}" for row in range(rows)])


def _prepared(
    run: RunConfig, data: DataConfig, model: Model, groups: Groups, done: int, ledger: Path | None
) -> Iterator[FedStep]:
    loader = build_loader(run, model, groups)
    names, weights = names_and_weights(loader, data)
    writer = None
    with agreed():
        if ledger is not None and groups.is_last_stage and groups.tensor_rank == 0:
            sizes = {source.name: len(source.index) for source in loader.sources}
            settings = {"data": data.to_dict(), "seed": run.train.seed, SIZES: sizes}
            writer = LedgerWriter(ledger, groups.data_rank, settings, done, groups.data_size)
    damaged = samples = 0
    try:
        for found in loader.steps(done, run.train.train_iters):
            settled = settle(found, groups, weights, names)
            if writer is not None:
                writer.write(found, _consumed(found, loader), settled.damaged, names)
            for one in settled.damaged:
                if not one.is_too_long:
                    logger.warning("sample %d of %s is left out: %s", one.sample.index, one.sample.source, one.problem)
            damaged, samples = damaged + settled.damaged_everywhere, samples + int((~found.plan.is_dropped).sum())
            _refuse_too_much(damaged, samples, data.most_damaged, data.samples_per_step)
            yield _fed(found, settled, data, names, groups)
    finally:
        if writer is not None:
            writer.close()


def names_and_weights(loader: Loader, data: DataConfig) -> tuple[list[str], list[float]]:
    """The names of the sources by their numbers, and what each stream's loss counts."""
    return [source.name for source in loader.sources], [stream.loss_weight for stream in data.streams]


def _fed(found: StepBatches, settled: Settled, data: DataConfig, names: list[str], groups: Groups) -> FedStep:
    on_device = [batch.to(groups.device) for batch in settled.batches]
    return FedStep(
        found.step + 1,
        on_device,
        work_of_plan(found.plan),
        sources_of(settled, data, names, groups),
        [[f"{one.source}:{one.index}" for one in row] for row in found.samples],
        partial(_samples_of_plan, found.plan, names),
    )


def sources_of(settled: Settled, data: DataConfig, names: list[str], groups: Groups) -> Sources | None:
    """What losses are told apart by: the streams' names where each has one source, else those of the sources."""
    if len(names) < 2:
        return None
    streams = [stream.name for stream in data.streams]
    if len(set(streams)) == len(names):
        names = streams
    return Sources(names, [tokens.to(groups.device) for tokens in settled.source_of_tokens])


def _samples_of_plan(plan: StepPlan, names: list[str]) -> list[str]:
    pairs = zip(plan.samples.source.tolist(), plan.samples.index.tolist(), strict=True)
    return [f"{names[source]}:{index}" for source, index in pairs]


def _consumed(found: StepBatches, loader: Loader) -> np.ndarray:
    """The places in the step of all samples of this data-parallel rank's rows, those left out included."""
    rows = loader.planner.rows_dealt(found.plan, loader.data_rank, loader.data_size)
    return np.flatnonzero(np.isin(found.plan.packing.row_of, rows))


def _refuse_too_much(damaged: int, samples: int, most: float, at_least: int) -> None:
    """Stop a run whose data are broken, all ranks at the same step; not for a single sample of the first steps."""
    if damaged > most * max(samples, at_least) and damaged > 1:
        remedy = "run `megavlm data lint` on the data sets named above, or raise --max-damaged-fraction"
        error = DataError("damaged samples", damaged, f"of {samples} are more than {most:.2%}", remedy)
        error.printed_by_rank = 0
        raise error
