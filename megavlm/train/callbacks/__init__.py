"""What happens around the steps of a run, one thing a file."""

from __future__ import annotations

from megavlm.build.run_config import RunConfig
from megavlm.parallel.groups import Groups
from megavlm.train.callbacks.base import Callback
from megavlm.train.callbacks.console import Console
from megavlm.train.callbacks.garbage import GarbageCollection
from megavlm.train.callbacks.json_lines import JsonLines
from megavlm.train.callbacks.metrics import Metrics, Sink
from megavlm.train.callbacks.profiler import Profiler
from megavlm.train.callbacks.progress_bar import ProgressBar
from megavlm.train.callbacks.tensorboard import TensorBoard
from megavlm.train.callbacks.weights_and_biases import WeightsAndBiases


def build_callbacks(run: RunConfig, groups: Groups) -> list[Callback]:
    """Those that the run's settings ask for, in the order in which they are called."""
    callbacks = [Console(run, groups), Metrics(run, groups, build_sinks(run)), Profiler(run, groups), ProgressBar()]
    return [GarbageCollection(run), *callbacks] if run.log.manual_gc else callbacks


def build_sinks(run: RunConfig) -> list[Sink]:
    """The places that are told of the run beside the console."""
    sinks: list[Sink] = []
    if run.log.log_json is not None:
        sinks.append(JsonLines(run.log.log_json))
    if run.log.tensorboard_dir is not None:
        sinks.append(TensorBoard(run.log.tensorboard_dir))
    if run.log.wandb_project is not None:
        sinks.append(WeightsAndBiases(run))
    return sinks
