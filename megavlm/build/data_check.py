"""What a run's data must be like before anything is built: there, counted with its tokenizer, and enough."""

from __future__ import annotations

from pathlib import Path

from megavlm.build.held_out import held_out_data
from megavlm.build.loader import build_words
from megavlm.build.run_config import RunConfig
from megavlm.data.catalog import CATALOG
from megavlm.data.index import DATASET_FILE
from megavlm.data.order import StepOrder
from megavlm.data.step_plan import DataConfig, open_sources
from megavlm.errors import ConfigError, DataError


def check_data(run: RunConfig) -> None:
    """Refuse data that are absent, of another tokenizer, or too few for the run's steps."""
    if run.data is None:
        return
    refuse_absent(run.data)
    sources = open_sources(run.data, build_words(run))
    sizes = {source.name: len(source.index) for source in sources}
    steps = StepOrder(run.data.streams, sizes, run.train.seed).steps
    if steps is not None and run.train.train_iters > steps:
        problem = f"is more than the {steps} steps of {run.data.samples_per_step} samples that the data have"
        raise ConfigError("train.train_iters", run.train.train_iters, problem, f"use --train-iters {steps}")

    if run.data.valid_path is not None:
        open_sources(held_out_data(run.data), build_words(run))


def refuse_absent(data: DataConfig) -> None:
    """Name the first data set that has not been prepared, how many there are, and how to prepare it."""
    folders = [Path(data.path) / source.name for stream in data.streams for source in stream.sources]
    absent = [folder for folder in folders if not (folder / DATASET_FILE).is_file()]
    if not absent:
        return
    problem = f"holds no prepared data set, one of {len(absent)} absent of this run's {len(folders)}"
    reader = next((f" --format {entry.reader}" for entry in CATALOG if entry.slug == absent[0].name), "")
    remedy = f"run `megavlm data prepare SOURCE... --out {absent[0]}{reader}`, or name another folder by --data-path"
    raise DataError("data set", str(absent[0]), problem, remedy)
