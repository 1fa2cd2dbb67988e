"""What a run tells of itself beside its lines on the console, and to whom."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from megavlm.config import Config, require
from megavlm.errors import UnavailableError


@dataclass(frozen=True, kw_only=True)
class LogConfig(Config):
    """Files, dashboards and profiles; every `log_interval` steps, as the console."""

    log_throughput: bool = False
    """Add to the console line: TFLOP/s a GPU as Megatron words it, MFU, tokens and images a second, waiting for data.
    The other places have them always."""
    peak_tflops: float | None = None
    """The chip's dense peak in TFLOP/s, by which MFU is measured; none: that of bfloat16, where the chip is known."""
    progress_bar: bool = True
    """On a terminal, keep a line with rate and time left below the log."""
    log_json: str | None = None
    """File of JSON lines: one for each logged step, evaluation and save. A run that goes on appends to it."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard, which needs the package `tensorboard`."""
    wandb_project: str | None = None
    """Project of Weights & Biases, which needs the package `wandb`; none: nothing is sent."""
    wandb_exp_name: str | None = None
    """What the run is called there; none: as the recipe."""
    wandb_entity: str | None = None
    """User or team that it belongs to there; none: the account's own."""
    wandb_save_dir: str | None = None
    """Folder of W&B's own files; none: `wandb` below that of `--save`, or below the one you stand in."""
    profile: bool = False
    """Profile the steps from `profile_step_start` to before `profile_step_end`, counted from 1."""
    profile_step_start: int = 10
    """The first step that is profiled."""
    profile_step_end: int = 12
    """The first step that is not profiled any more."""
    profile_ranks: tuple[int, ...] = (0,)
    """The ranks that profile."""
    profile_dir: str | None = None
    """Folder of the traces; none: `profile` below that of `--save`, or below the one you stand in."""
    use_pytorch_profiler: bool = True
    """Write Chrome traces by torch's profiler; without it the steps are marked for `nsys profile -c cudaProfilerApi`,
    on GPUs alone."""
    nvtx_ranges: bool = False
    """Name the parts of each step for Nsight Systems, also where nothing is profiled."""
    manual_gc: bool = False
    """Collect garbage only when told to, on all ranks behind the same step, so that none waits for another's pause."""
    manual_gc_interval: int = 0
    """Steps between two collections under `manual_gc`; 0: none behind the first step."""

    def check(self) -> None:
        for name in ("log_json", "tensorboard_dir", "wandb_project", "wandb_exp_name", "wandb_save_dir", "profile_dir"):
            require(getattr(self, name) != "", self, name, "is empty", "give a name, or leave it out")
        positive = self.peak_tflops is None or self.peak_tflops > 0
        require(positive, self, "peak_tflops", "is no speed", "use for example 312 for an A100")
        require(self.profile_step_start >= 1, self, "profile_step_start", "is below 1", "steps are counted from 1")
        require(
            self.profile_step_end > self.profile_step_start,
            self,
            "profile_step_end",
            f"leaves no step behind profile_step_start {self.profile_step_start}",
            f"use at least {self.profile_step_start + 1}",
        )
        require(self.manual_gc_interval >= 0, self, "manual_gc_interval", "is negative", "use 0 or more")
        require(all(rank >= 0 for rank in self.profile_ranks), self, "profile_ranks", "has no rank", "count from 0")
        for name in ("wandb_exp_name", "wandb_entity", "wandb_save_dir"):
            alone = getattr(self, name) is not None and self.wandb_project is None
            require(not alone, self, name, "is for a run in W&B, and there is no project", "add --wandb-project NAME")


def check_installed(log: LogConfig) -> None:
    """Refuse what needs a package that is not installed, before anything is built."""
    for option, value, package in (
        ("--tensorboard-dir", log.tensorboard_dir, "tensorboard"),
        ("--wandb-project", log.wandb_project, "wandb"),
    ):
        if value is not None and find_spec(package) is None:
            problem = f"needs the package {package}, which is not installed"
            raise UnavailableError(option, value, problem, f"run `pip install {package}`, or leave {option} out")
