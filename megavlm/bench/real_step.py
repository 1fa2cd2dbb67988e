"""A training step of a real model on one GPU, ours against transformers': speed, share of the peak, memory.

Each side has the GPU to itself, in a process of its own, one after the other: two real models with their optimizers do
not fit side by side, and only so its peak of memory is its own. Both start from one folder of random weights and see
the same samples, and their losses are compared step by step. Ours keeps bf16 weights with float32 masters; theirs
float32 weights under autocast, as transformers' Trainer has it, and what is frozen in bf16. Beside our peak of memory
stands what a plan says of the same rows. Without a GPU the same code runs at toy size in float32, for tests.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from megavlm.batch import AttendedMedia, TextBatch
from megavlm.bench import processes
from megavlm.bench.harness import (
    THREADS,
    Comparison,
    Figure,
    Measurement,
    NoRowError,
    Pass,
    Side,
    SkippedError,
    figure,
)
from megavlm.bench.steps import our_side, their_side
from megavlm.build.costs import Work, causal_work, part_costs
from megavlm.build.model import build_model
from megavlm.build.run_config import OptimizerConfig, PrecisionConfig, RunConfig, WeightsConfig
from megavlm.model.backend import is_transformer_engine, spec_provider
from megavlm.parallel import groups as parallel_groups
from megavlm.plan.profile import MemoryUse
from megavlm.plan.rows import PlannedRow
from megavlm.plan.stage import profile_run
from megavlm.platform.device import FIRST_FP8_CAPABILITY, bf16_peak_tflops

PLANNED_TARGET = 1.1
"""Of the planned peak over the allocated one; it should not be below 0.9 either."""
GIGABYTES = 75
"""What a GPU of 80 GB has at least: the largest workload needs about so much."""
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where both sides compute, and in what: the one thing that a machine without a GPU changes."""

    device: torch.device
    dtype: torch.dtype
    """Of products."""
    tolerance: float
    """How far apart the losses of both may be, relative."""

    @property
    def words(self) -> Literal["float32", "bfloat16"]:
        return "bfloat16" if self.dtype == torch.bfloat16 else "float32"


def this_place() -> Place:
    """This machine's."""
    if torch.cuda.is_available():
        return Place(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, 1e-2)
    return Place(torch.device("cpu"), torch.float32, 1e-4)


class Workload(ABC):
    """A model, what of it learns, and the samples of its steps; handed to the processes of the sides as it is."""

    name: str
    about: str
    """The samples of a step, in words."""
    run: RunConfig
    """The model's shape, what learns, and recompute."""

    @abstractmethod
    def fresh_model(self) -> Any:
        """transformers' model with random weights, where torch's default device is."""

    @abstractmethod
    def model_of(self, folder: Path) -> Any:
        """transformers' model from a folder, in float32, with gradients for what learns."""

    @abstractmethod
    def our_step(self, number: int) -> Sequence[TextBatch]:
        """The microbatches of a step."""

    @abstractmethod
    def planned_step(self, number: int) -> Sequence[PlannedRow]:
        """The same microbatches as a plan knows them, by their sizes."""

    @abstractmethod
    def their_step(self, number: int) -> Sequence[dict[str, Tensor]]:
        """The same samples as transformers' model takes them."""


@dataclass(frozen=True)
class SideResult:
    """What one side's process found."""

    passes: Sequence[Pass]
    parameters: int
    allocated: int | None
    """Bytes of GPU memory in tensors at most, behind the warm-up; None without a GPU."""
    reserved: int | None
    """The same with what the allocator keeps."""


@contextmanager
def real_step(workload: Workload, quick: bool) -> Iterator[Comparison | Measurement]:
    """Both sides' processes; where theirs fails, ours alone is measured, and the failure told."""
    place = this_place()
    if not quick:
        _check_gpu(place)
    rounds, warmup = (1, 0) if quick else (8, 3)
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "weights"
        _alone(write_folder, workload, folder)
        ours = _alone(our_passes, workload, folder, warmup, rounds, "none")
        problems: list[str] = []
        fp8 = None
        if not quick and has_fp8():
            fp8 = _attempt(problems, "in FP8", our_passes, workload, folder, warmup, rounds, "hybrid")
        theirs = _attempt(problems, "transformers", their_passes, workload, folder, warmup, rounds)
        rows = [row for number in range(warmup, warmup + rounds) for row in workload.planned_step(number)]
        each = len(workload.planned_step(0))
        planned = _attempt(problems, "the plan", planned_memory, run_at(workload, folder, place), rows, each)
    case = f"{ours.parameters / 1e9:.2f}B parameters, {place.words}: {workload.about}"
    sides = {"megavlm": ours, "megavlm, FP8": fp8, "transformers": theirs}
    known = {name: side for name, side in sides.items() if side is not None}

    def figures() -> Sequence[Figure]:
        found = [one for name, side in known.items() for one in figures_of(name, side, workload, warmup)]
        return [*found, *(planned_figures(planned, ours.allocated) if planned else [])]

    if theirs is None:
        yield Measurement(workload.name, case, figures)
    else:
        yield Comparison(
            benchmark=workload.name,
            case=case,
            ours=_replay("megavlm", ours),
            theirs=_replay("transformers", theirs),
            target=None,
            rounds=rounds,
            warmup=warmup,
            tolerance=place.tolerance,
            beside=None if fp8 is None else _replay("megavlm, FP8", fp8),
            figures=figures,
        )
    if problems:
        raise NoRowError(f"{workload.name}: {'; '.join(problems)}")


def _check_gpu(place: Place) -> None:
    if place.device.type == "cpu":
        raise SkippedError("needs a GPU")
    memory = torch.cuda.get_device_properties(place.device).total_memory / 1e9
    if memory < GIGABYTES:
        raise SkippedError(f"needs {GIGABYTES} GB of GPU memory, and this one has {memory:.0f}")


def has_fp8() -> bool:
    """Whether FP8 can be measured here."""
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FIRST_FP8_CAPABILITY
    return capable and is_transformer_engine(spec_provider("auto"))


def figures_of(name: str, side: SideResult, workload: Workload, warmup: int) -> list[Figure]:
    """Real tokens and the model's own operations a second: padding and what is recomputed add nothing."""
    seconds = [one.seconds for one in side.passes[warmup:]]
    work = [work_of(workload.our_step(number)) for number in range(warmup, len(side.passes))]
    pairs = list(zip(work, seconds, strict=True))
    tflops = [part_costs(workload.run, one).total / took / 1e12 for one, took in pairs]
    found = [
        figure(f"{name}: tokens a second", "1/s", [one.tokens / took for one, took in pairs]),
        figure(f"{name}: the model's operations", "TFLOP/s", tflops),
    ]
    peak = bf16_peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if peak is not None:
        found.append(figure(f"{name}: MFU", "%", [100 * one / peak for one in tflops]))
    for kind, size in (("allocated", side.allocated), ("reserved", side.reserved)):
        if size is not None:
            found.append(figure(f"{name}: GPU memory {kind} at most", "GB", [size / 1e9]))
    return found


def planned_figures(planned: MemoryUse, allocated: int | None) -> list[Figure]:
    """What a plan takes our side to allocate, and how that stands to what was measured."""
    size = planned.total - planned.communication  # which is not torch's
    found = [figure("megavlm: GPU memory planned", "GB", [size / 1e9])]
    if allocated is not None:
        found.append(figure("megavlm: GPU memory planned / allocated", "", [size / allocated], PLANNED_TARGET))
    return found


def planned_memory(run: RunConfig, rows: Sequence[PlannedRow], microbatches: int) -> MemoryUse:
    """What a plan says of steps of so many of these rows; asked in a process that has not touched a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as `megavlm plan` traces
    processes.be_alone()
    torch.set_num_threads(THREADS)
    most = {"mean": max(rows, key=lambda row: row.length), "worst": max(rows, key=lambda row: row.tiles)}
    (profile,) = profile_run(run, 1, microbatches, most)
    return max((profile.mean.memory, profile.worst.memory), key=lambda memory: memory.total)


def work_of(batches: Sequence[TextBatch]) -> Work:
    """What passes through the model in a step of packed rows."""
    lengths = torch.cat([batch.cu_seqlens.diff().long() for batch in batches if batch.cu_seqlens is not None])
    media = [batch.media for batch in batches if batch.media is not None]
    seeing = sum(int((one.image_of_token >= 0).sum()) for one in media if isinstance(one, AttendedMedia))
    return causal_work(
        float(lengths.sum()), float(lengths.square().sum()), sum(one.images for one in media), float(seeing)
    )


def run_at(workload: Workload, folder: Path, place: Place, fp8: Literal["none", "hybrid"] = "none") -> RunConfig:
    """The workload's run from this folder's weights, at a steady rate."""
    return workload.run.replace(
        precision=PrecisionConfig(params_dtype=place.words, fp8_format=fp8),
        optimizer=OptimizerConfig(lr=1e-5),
        weights=WeightsConfig(load_hf=str(folder)),
    )


def write_folder(workload: Workload, folder: Path) -> None:
    """Random weights as a folder."""
    place = _begin()
    torch.manual_seed(1)
    with torch.device(place.device):  # a CPU takes minutes for what a GPU draws in a second
        model = workload.fresh_model()
    model.to(place.dtype).save_pretrained(folder)


def our_passes(
    workload: Workload, folder: Path, warmup: int, rounds: int, fp8: Literal["none", "hybrid"]
) -> SideResult:
    """Ours, as every run trains."""
    place = _begin()
    run = run_at(workload, folder, place, fp8)
    parallel_groups.join()
    groups = parallel_groups.start(run.parallel, run.train.seed)
    try:
        model = build_model(run, groups)
        side = our_side(model, run, groups, (workload.our_step(number) for number in count()))
        parameters = sum(parameter.numel() for part in model.parts() for parameter in part.parameters())
        return _measured(side, parameters, warmup, rounds)
    finally:
        parallel_groups.leave()


def their_passes(workload: Workload, folder: Path, warmup: int, rounds: int) -> SideResult:
    """transformers' model in plain torch."""
    place = _begin()
    model = workload.model_of(folder)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(place.dtype)
    autocast = place.dtype if place.dtype != torch.float32 else None
    settings = run_at(workload, folder, place).optimizer
    steps = (workload.their_step(number) for number in count())
    side = their_side(model.to(place.device), settings, place.device, steps, autocast)
    return _measured(side, model.num_parameters(), warmup, rounds)


def _begin() -> Place:
    processes.be_alone()
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    return this_place()


def _measured(side: Side, parameters: int, warmup: int, rounds: int) -> SideResult:
    passes = [side.run() for _ in range(warmup)]
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    passes += [side.run() for _ in range(rounds)]
    allocated, reserved = (
        (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if has_gpu else (None,) * 2
    )
    return SideResult(passes, parameters, allocated, reserved)


def _alone(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Call it in a fresh process, which leaves no memory behind."""
    with ProcessPoolExecutor(1, mp_context=processes.fresh()) as pool:
        return pool.submit(function, *arguments, **keywords).result()


def _attempt(problems: list[str], side: str, function: Callable[..., T], *arguments: Any) -> T | None:
    """The same; a failure (memory, most often) is told, and costs no other side its figures."""
    try:
        return _alone(function, *arguments)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        problems.append(f"{side} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None


def _replay(name: str, result: SideResult) -> Side:
    passes = iter(result.passes)
    return Side(name, lambda: next(passes))
