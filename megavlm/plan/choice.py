"""A layout as the search chooses it: degrees, recompute, who encodes images; and the options that ask for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from megavlm.build.run_config import RunConfig
from megavlm.config import Config
from megavlm.parallel.layout import AUTO

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
"""From the fastest to the one that holds least."""
SELECTED = ("core_attn", "mlp")
"""What is computed again where only some modules are: attention, and the widest activations of a layer."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Everything about a layout that is scale and not science."""

    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    """Of each stage; more than 1: the interleaved schedule."""
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    towers_everywhere: bool = False
    """Whether a frozen tower encodes on all stages, ahead of the schedule."""
    micro_batch: int | None = None
    """Rows at once of toy text; none: as the run has it."""
    rows_multiple: int | None = None
    """Rows of a step are a multiple of it; none: as the run has it."""

    @property
    def model_parallel(self) -> int:
        return self.tensor * self.pipeline

    def data_parallel(self, gpus: int) -> int:
        """Copies of the model on so many GPUs."""
        return gpus // self.model_parallel

    def changes(self, run: RunConfig) -> list[tuple[str, Any]]:
        """What it sets, by the paths of the run's settings."""
        changes: list[tuple[str, Any]] = [
            ("parallel.tensor_model_parallel_size", self.tensor),
            ("parallel.pipeline_model_parallel_size", self.pipeline),
            ("parallel.virtual_pipeline_model_parallel_size", self.chunks),
            # Cut by cost: with a tower in front and a vocabulary behind, equal numbers of layers are no equal stages.
            ("parallel.pipeline_model_parallel_layout", AUTO if self.pipeline > 1 else None),
            ("parallel.sequence_parallel", self.sequence_parallel),
            ("parallel.vision_over", "all_stages" if self.towers_everywhere else "first_stage"),
            ("recompute.granularity", self.recompute),
        ]
        if self.recompute == "selective":
            changes.append(("recompute.modules", list(SELECTED)))
        if self.recompute == "full":
            changes += [("recompute.method", "uniform"), ("recompute.num_layers", 1)]
        changes.append(("recompute.vision_tower", self.recompute != "none" and "tower" in run.trainable))
        for path, value in (
            ("train.micro_batch_size", self.micro_batch),
            ("data.rows.rows_multiple", self.rows_multiple),
        ):
            if value is not None:
                changes.append((path, value))
        return changes

    def apply(self, run: RunConfig) -> RunConfig:
        """The run with this layout, checked as any settings are."""
        sections: dict[str, dict[str, Any]] = {}
        for path, value in self.changes(run):
            section, _, name = path.rpartition(".")
            sections.setdefault(section, {})[name] = value
        rows = sections.pop("data.rows", None)
        changed: dict[str, Config] = {name: getattr(run, name).replace(**given) for name, given in sections.items()}
        if rows and run.data is not None:
            changed["data"] = run.data.replace(rows=run.data.rows.replace(**rows))
        return run.replace(**changed)

    @property
    def name(self) -> str:
        """In a few words, for tables."""
        parts = [f"TP {self.tensor}"]
        parts.append(f"PP {self.pipeline}" + (f" x {self.chunks} chunks" if self.chunks > 1 else ""))
        if self.sequence_parallel:
            parts.append("SP")
        if self.recompute != "none":
            parts.append(f"{self.recompute} recompute")
        if self.towers_everywhere:
            parts.append("tower on all stages")
        if self.micro_batch is not None:
            parts.append(f"micro-batch {self.micro_batch}")
        if self.rows_multiple is not None:
            parts.append(f"rows by {self.rows_multiple}")
        return ", ".join(parts)

    def options(self, run: RunConfig) -> str:
        """What differs from the run, as it is typed behind `megavlm train RECIPE`."""
        return " ".join(_spelled(path, value) for path, value in self.changes(run) if _at(run, path) != value)


_OPTIONS = {
    "parallel.tensor_model_parallel_size": "--tensor-model-parallel-size",
    "parallel.pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "parallel.virtual_pipeline_model_parallel_size": "--num-virtual-stages-per-pipeline-rank",
    "parallel.pipeline_model_parallel_layout": "--pipeline-model-parallel-layout",
    "parallel.sequence_parallel": "--sequence-parallel",
    "parallel.vision_over": "--vision-over",
    "recompute.granularity": "--recompute-granularity",
    "recompute.modules": "--recompute-modules",
    "recompute.vision_tower": "--recompute-vision-tower",
    "train.micro_batch_size": "--micro-batch-size",
}


def _at(run: RunConfig, path: str) -> Any:
    value = functools.reduce(getattr, path.split("."), run)
    return list(value) if isinstance(value, tuple) else value


def _spelled(path: str, value: Any) -> str:
    option = _OPTIONS.get(path)
    if option is None:
        return f"{path}={value}"
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    if isinstance(value, list):
        return " ".join([option, *map(str, value)])
    return f"{option} {'none' if value is None else value}"
