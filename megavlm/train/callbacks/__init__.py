"""What happens around the steps of a run, one thing a file."""

from __future__ import annotations

from megavlm.build.run_config import RunConfig
from megavlm.parallel.groups import Groups
from megavlm.train.callbacks.base import Callback
from megavlm.train.callbacks.console import Console


def build_callbacks(run: RunConfig, groups: Groups) -> list[Callback]:
    """Those that the run's settings ask for, in the order in which they are called."""
    return [Console(run, groups)]
