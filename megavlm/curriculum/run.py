"""Training stage after stage, in one group of processes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from megavlm.build.model import build_model
from megavlm.build.run_config import ParallelConfig, RunConfig, WeightsConfig
from megavlm.checkpoint.lock import held
from megavlm.curriculum.stages import Stage, table
from megavlm.export.hf_export import export_model
from megavlm.log import get_logger
from megavlm.parallel import groups as process_groups
from megavlm.parallel.groups import Groups
from megavlm.train.loop import train

logger = get_logger(__name__)


class Places:
    """The process groups of each stage: those of the one before as long as the layout stays, for they cost memory."""

    def __init__(self) -> None:
        self._parallel: ParallelConfig | None = None
        self._groups: Groups | None = None

    def of(self, run: RunConfig) -> Groups:
        """Generators seeded, as if the stage were a run of its own."""
        if self._groups is not None and run.parallel == self._parallel:
            process_groups.seed_generators(run.train.seed)
            return self._groups
        process_groups.stop()
        self._parallel, self._groups = run.parallel, process_groups.start(run.parallel, run.train.seed)
        return self._groups


def train_stages(stages: Sequence[Stage]) -> str | None:
    """Train and export what is not done yet; why it stopped before the end, or None where all is done."""
    for line in table(stages):
        logger.info("%s", line)
    with held(_folder_of_all(stages)):
        return _train_in_order(stages)


def _folder_of_all(stages: Sequence[Stage]) -> Path | None:
    """It is held beside each stage's own: between two stages nobody else is to begin the next one."""
    folders = [stage.run.checkpoint.save_to for stage in stages if not stage.is_trained or stage.lacks_export]
    return Path(folders[0]).parent if folders and folders[0] else None


def _train_in_order(stages: Sequence[Stage]) -> str | None:
    places = Places()
    for stage in stages:
        if not stage.is_trained:
            stopped = _train(stage, places)
            _free_memory()
            if stopped is not None:
                return stopped
        elif stage.lacks_export:
            _export(stage, places)
            _free_memory()
    return None


def _train(stage: Stage, places: Places) -> str | None:
    """One stage to its end, of which nothing is left in memory when this returns."""
    logger.info("%s", stage.run.to_yaml())
    groups = places.of(stage.run)
    outcome = train(stage.run, groups)
    export = stage.run.weights.export_hf
    if outcome.stopped is None and export is not None:
        export_model(outcome.model, stage.run, groups, export, tokenizer_from=stage.tokenizer)
        logger.info("exported to %s", export)
    return outcome.stopped


def _export(stage: Stage, places: Places) -> None:
    """The export of a stage that was killed behind its last step."""
    export = stage.run.weights.export_hf
    assert export is not None and stage.run.checkpoint.save_to is not None
    run = stage.run.replace(weights=WeightsConfig(pretrained_checkpoint=stage.run.checkpoint.save_to))
    groups = places.of(run)
    export_model(build_model(run, groups), run, groups, export, tokenizer_from=stage.tokenizer)
    logger.info("exported to %s", export)


def _free_memory() -> None:
    """Before the next stage is built: a wrapped model refers to itself in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
