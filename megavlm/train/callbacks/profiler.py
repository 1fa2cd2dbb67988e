"""A profile of a window of steps: Chrome traces by torch's profiler, or marks for Nsight Systems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megavlm import ranges
from megavlm.build.run_config import RunConfig
from megavlm.errors import UnavailableError
from megavlm.log import get_logger
from megavlm.parallel.agree import agreed
from megavlm.parallel.groups import Groups
from megavlm.train.callbacks.base import Callback
from megavlm.train.report import RunStart, StepReport

logger = get_logger(__name__)


class Profiler(Callback):
    """Profiles on the ranks that the settings name, or only names the parts of steps there."""

    def __init__(self, run: RunConfig, groups: Groups) -> None:
        self._log, self._rank = run.log, groups.rank
        self._folder = profile_folder(run)
        self._steps: range = range(run.log.profile_step_start, run.log.profile_step_end)
        self._profiles = run.log.profile and groups.rank in run.log.profile_ranks
        self._profile: Any = None
        self._first = 0
        self._names_all = False

    def start(self, start: RunStart) -> None:
        with agreed():
            if self._log.profile:
                self._check(start.groups)
        if self._log.nvtx_ranges:
            self._names_all = True
            ranges.switch_on()

    def _check(self, groups: Groups) -> None:
        beyond = [rank for rank in self._log.profile_ranks if rank >= groups.world_size]
        if beyond:
            problem = f"there are {groups.world_size} ranks"
            raise UnavailableError("--profile-ranks", beyond, problem, f"use 0 to {groups.world_size - 1}")
        if not self._log.use_pytorch_profiler and not torch.cuda.is_available():
            remedy = "use --use-pytorch-profiler"
            raise UnavailableError("--no-use-pytorch-profiler", True, "is for Nsight Systems on GPUs", remedy)
        if self._profiles and self._log.use_pytorch_profiler:
            self._folder.mkdir(parents=True, exist_ok=True)

    def before_step(self, iteration: int) -> None:
        if self._profiles and self._profile is None and iteration in self._steps:
            self._first = iteration
            ranges.switch_on()
            self._profile = _torch_profile() if self._log.use_pytorch_profiler else torch.cuda.profiler
            self._profile.start()

    def after_step(self, report: StepReport) -> None:
        if self._profile is not None and report.iteration + 1 not in self._steps:
            self._finish(report.iteration)

    def end(self, iteration: int) -> None:
        if self._profile is not None:
            self._finish(iteration)
        if self._names_all:
            self._names_all = False
            ranges.switch_off()

    def _finish(self, last: int) -> None:
        profile, self._profile, self._profiles = self._profile, None, False
        profile.stop()
        ranges.switch_off()
        if not self._log.use_pytorch_profiler:
            return
        path = self._folder / f"rank-{self._rank:05d}-steps-{self._first}-{last}.json.gz"
        try:
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.warning("the profile %s cannot be written: %s", path, error)
            return
        logger.info("profile of steps %d to %d: %s (open it in https://ui.perfetto.dev)", self._first, last, path)


def profile_folder(run: RunConfig) -> Path:
    """Where the traces go."""
    if run.log.profile_dir is not None:
        return Path(run.log.profile_dir)
    return Path(run.checkpoint.save_to or ".") / "profile"


def _torch_profile() -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)
