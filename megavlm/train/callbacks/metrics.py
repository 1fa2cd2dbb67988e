"""What logs and dashboards are told, from one place: the rank that speaks collects it, each sink writes it its way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from megavlm.build.run_config import RunConfig
from megavlm.log import get_logger
from megavlm.parallel.agree import agreed
from megavlm.parallel.groups import Groups
from megavlm.train.callbacks.base import Callback
from megavlm.train.callbacks.window import LoggedSteps, Window
from megavlm.train.report import RunStart, StepReport

logger = get_logger(__name__)


class Sink(ABC):
    """One place that is told; methods are called on the rank that speaks alone."""

    name: str
    """As a warning calls it."""

    @abstractmethod
    def open(self, start: RunStart) -> None:
        """Before the first step; a user's mistake raises a typed error, which ends the run."""

    @abstractmethod
    def steps(self, logged: LoggedSteps) -> None:
        """Every `log_interval` steps."""

    @abstractmethod
    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Behind an evaluation."""

    @abstractmethod
    def saved(self, iteration: int, blocked_ms: float) -> None:
        """Behind a save."""

    @abstractmethod
    def close(self, iteration: int) -> None:
        """Behind the last step; also where it never opened."""


class Metrics(Callback):
    """Tells all sinks. One that fails while the run goes on is given up with a warning: training is worth more."""

    def __init__(self, run: RunConfig, groups: Groups, sinks: Sequence[Sink]) -> None:
        self._speaks = groups.speaks
        self._sinks = list(sinks) if groups.speaks else []
        self._window = Window(run, groups)

    def start(self, start: RunStart) -> None:
        with agreed():
            for sink in self._sinks:
                sink.open(start)

    def after_step(self, report: StepReport) -> None:
        logged = self._window.add(report) if self._sinks else None
        if logged is not None:
            self._tell(lambda sink: sink.steps(logged))

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        self._tell(lambda sink: sink.evaluated(iteration, losses))

    def saved(self, iteration: int, blocked_ms: float) -> None:
        self._tell(lambda sink: sink.saved(iteration, blocked_ms))

    def end(self, iteration: int) -> None:
        self._tell(lambda sink: sink.close(iteration))

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                what(sink)
            except Exception as error:  # whatever a dashboard's package may raise
                self._sinks.remove(sink)
                logger.warning("%s gets no more of this run: %s: %s", sink.name, type(error).__name__, error)
