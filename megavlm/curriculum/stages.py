"""The stages of a run: where each saves and what it starts from, and how far each has come, by what is on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.build.data_check import check_data
from megavlm.build.identity import model_identity
from megavlm.build.log_config import LogConfig, check_installed
from megavlm.build.run_config import RunConfig, WeightsConfig, check_for_world
from megavlm.checkpoint import shelf
from megavlm.checkpoint.identity import differing
from megavlm.checkpoint.sealed import check_file, read_seal
from megavlm.errors import CheckpointError, ConfigError, MegavlmError


@dataclass(frozen=True)
class Stage:
    """One of them, placed among the others."""

    name: str
    run: RunConfig
    """With the folders of this stage, and the weights that it starts from."""
    step: int
    """How many steps are done and saved."""
    origin: str
    """What it starts from, for the user."""
    tokenizer: str | None
    """The folder of the tokenizer that goes along with an export."""

    @property
    def is_trained(self) -> bool:
        return self.step >= self.run.train.train_iters

    @property
    def lacks_export(self) -> bool:
        """Whether a folder is still to be written: exports appear whole or not at all."""
        export = self.run.weights.export_hf
        return export is not None and not os.path.exists(export)

    @property
    def state(self) -> str:
        if self.is_trained:
            return "to export" if self.lacks_export else "done"
        return f"at step {self.step}" if self.step else "to do"


def place_stages(runs: Mapping[str, RunConfig], chosen: Sequence[str], world_size: int) -> list[Stage]:
    """The chosen stages of all of a model's, with every mistake that can be seen now refused."""
    found: list[Stage] = []
    previous: tuple[str, RunConfig, int] | None = None
    for name, asked in runs.items():
        try:
            run = with_folders(name, asked)
            step = _steps_done(run)
            if name in chosen:
                found.append(_placed(name, run, step, previous, is_before=bool(found)))
                _check(found[-1], previous, world_size)
            previous = name, run, step
        except MegavlmError as error:
            raise type(error)(f"{name}: {error.where}", error.value, error.problem, error.remedy) from error
    return found


def table(stages: Sequence[Stage]) -> list[str]:
    """Lines that say of each stage how long it is, how far it has come, and what it starts from."""
    rows = [("stage", "steps", "state", "starts from")]
    rows += [(stage.name, str(stage.run.train.train_iters), stage.state, stage.origin) for stage in stages]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]


def with_folders(name: str, run: RunConfig) -> RunConfig:
    """The stage's own folders below those that the options name."""
    save, load, export = run.checkpoint.save_to, run.checkpoint.load_from, run.weights.export_hf
    if save is None:
        problem = "is missing, and a stage starts from what the one before it has saved"
        raise ConfigError("--save", None, problem, "name a folder; each stage gets one of its own below it")
    if load is not None:
        remedy = "leave it out to go on from --save, or start from weights with --pretrained-checkpoint"
        raise ConfigError("--load", load, "is of one stage, and this run has several", remedy)
    return run.replace(
        checkpoint=run.checkpoint.replace(save_to=str(Path(save) / name)),
        weights=run.weights.replace(export_hf=export and str(Path(export) / name)),
        log=_log_of(name, run.log),
    )


def _log_of(name: str, log: LogConfig) -> LogConfig:
    """Each stage counts its steps from 1, so it has a log of its own: `run.jsonl` is `run-STAGE.jsonl`."""
    file = log.log_json and Path(log.log_json)
    return log.replace(
        log_json=str(file.with_stem(f"{file.stem}-{name}")) if file else None,
        tensorboard_dir=log.tensorboard_dir and str(Path(log.tensorboard_dir) / name),
        profile_dir=log.profile_dir and str(Path(log.profile_dir) / name),
        wandb_exp_name=log.wandb_exp_name and f"{log.wandb_exp_name}/{name}",
    )


def _steps_done(run: RunConfig) -> int:
    """Of the latest checkpoint. One that ends its stage has to be whole, by its files' names and sizes at least."""
    folder = Path(run.checkpoint.save_to or "")
    tolerant = run.checkpoint.load_previous_if_damaged
    try:
        step = shelf.latest_step(folder) or 0
    except CheckpointError:
        if not tolerant:
            raise
        step = max(shelf.steps_saved(folder), default=0)
    if step < run.train.train_iters:
        return step
    path = shelf.checkpoint_path(folder, step)
    try:
        files = read_seal(path)
        for name, entry in files.items() if tolerant else ():
            check_file(path / name, entry)
    except CheckpointError:
        if not tolerant:
            raise
        return max((one for one in shelf.steps_saved(folder) if one < step), default=0)
    return step


def _placed(
    name: str, run: RunConfig, step: int, previous: tuple[str, RunConfig, int] | None, is_before: bool
) -> Stage:
    """The stage with its weights: those of the stage before, or the user's own."""
    tokenizer, weights = run.tokenizer_folder, run.weights
    if previous is None or not _hands_over(previous, weights, is_before):
        chosen = weights.load_hf or weights.pretrained_checkpoint
        return Stage(name, run, step, chosen or "random weights", tokenizer)
    before, its_run, its_step = previous
    end = max(its_step, its_run.train.train_iters)
    path = shelf.checkpoint_path(Path(its_run.checkpoint.save_to or ""), end)
    run = run.replace(
        weights=WeightsConfig(pretrained_checkpoint=str(path), export_hf=weights.export_hf),
        data=run.data and run.data.replace(tokenizer=tokenizer),
    )
    _refuse_other_origin(run, step, before, path)
    return Stage(name, run, step, f"{before}, step {end}", tokenizer)


def _hands_over(previous: tuple[str, RunConfig, int], weights: WeightsConfig, is_before: bool) -> bool:
    """Whether the stage before gives the weights: it does, unless it is left out and was never begun."""
    name, run, step = previous
    if is_before or step >= run.train.train_iters:
        return True
    if step == 0 and (weights.load_hf or weights.pretrained_checkpoint):
        return False
    state = f"is at step {step} of {run.train.train_iters}" if step else "has not been trained"
    problem = f"leaves out {name}, which {state} and gives the weights"
    remedy = f"take {name} along" + ("" if step else ", or name weights by --load-hf or --pretrained-checkpoint")
    raise ConfigError("--stages", None, problem, remedy)


def _refuse_other_origin(run: RunConfig, step: int, before: str, path: Path) -> None:
    """Refuse to go on with, or to believe in, a stage that started from what its predecessor no longer ends with."""
    if step == 0:
        return
    folder = Path(run.checkpoint.save_to or "")
    record = _record(folder, step, tolerant=run.checkpoint.load_previous_if_damaged)
    if record is None:
        return  # none can be read, which loading is going to say
    settings: Any = record.get("run")
    weights = settings.get("weights") if isinstance(settings, dict) else None
    origin = weights.get("pretrained_checkpoint") if isinstance(weights, dict) else None
    if not isinstance(origin, str) or Path(origin).name != path.name:
        problem = f"is what its checkpoints started from, and {before} now ends with {path.name}"
        remedy = f"move {folder} away to train the stage again, or take the steps that {before} had"
        raise CheckpointError("weights.pretrained_checkpoint", origin, problem, remedy)


def _record(folder: Path, step: int, tolerant: bool) -> dict[str, Any] | None:
    """What the checkpoint of this step says of its run, or the latest before it that can be read."""
    if not tolerant:
        return shelf.read_run(shelf.checkpoint_path(folder, step))
    for one in reversed([saved for saved in shelf.steps_saved(folder) if saved <= step]):
        with contextlib.suppress(OSError, CheckpointError):
            return shelf.read_run(shelf.checkpoint_path(folder, one))
    return None


def _check(stage: Stage, previous: tuple[str, RunConfig, int] | None, world_size: int) -> None:
    check_for_world(stage.run, world_size)
    check_installed(stage.run.log)
    if previous is not None:
        differs = differing(model_identity(previous[1]), model_identity(stage.run))
        if differs is not None:
            name, theirs, mine = differs
            problem = f"the stage {previous[0]} has {theirs!r}, and its weights are handed over"
            raise ConfigError(name, mine, problem, "give both stages the same model")
    if not stage.is_trained:
        check_data(stage.run)
        export = stage.run.weights.export_hf
        if export is not None and os.path.exists(export):
            raise ConfigError("--export-hf", export, "exists already, and the stage is not finished", "move it away")
