"""Plans of one run, or of several that follow one another: a layout for each, given or found, and what it comes to."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megavlm.build.run_config import RunConfig
from megavlm.errors import LayoutError, MegavlmError
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster
from megavlm.plan.cost import Decoding, Efficiency
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.further import Promising
from megavlm.plan.guess import Guesser, StepRows
from megavlm.plan.judge import drawn_of, judge, rate_of
from megavlm.plan.loading import Loading, loading_of, with_loading
from megavlm.plan.mix import Mix, mix_of
from megavlm.plan.scale import ScalePoint, counts, rows_of, scale
from megavlm.plan.search import MOST_TRACES, SearchResult, search, with_rows
from megavlm.plan.stage import Traces

REMEDY = "use more tensor or pipeline parallelism, --recompute-granularity full, or shorter rows"


@dataclass(frozen=True)
class Budget:
    """How far a search goes."""

    traces: int
    seconds: float
    """After which no layout is traced any more."""


ALONE = Budget(MOST_TRACES, 47.0)
OF_SEVERAL = Budget(6, 25.0)
"""Of each stage where a whole model is planned: what it lacks, a plan of the stage by itself finds."""


SCALE_SECONDS = 90.0
"""After which no layout is traced for larger numbers of GPUs."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A run as it is planned; or why it cannot be."""

    name: str
    asked: RunConfig
    """As it was given, before a layout was looked for."""
    run: RunConfig
    """In the layout that is planned."""
    options: str = ""
    """That ask for it, as typed behind `megavlm train RECIPE`."""
    evaluation: Evaluation | None = None
    mix: Mix | None = None
    loading: Loading | None = None
    search: SearchResult | None = None
    layout_of: str | None = None
    """The stage before whose layout was taken, since the same parts of the model learn."""
    scale: Sequence[ScalePoint] = ()
    notes: tuple[str, ...] = ()
    """What else is to be known of it."""
    refused: MegavlmError | None = None
    """Why it could not be judged at all."""

    @property
    def problem(self) -> MegavlmError | None:
        """Why it does not work; none where it does."""
        if self.evaluation is None or self.evaluation.fits:
            return self.refused
        return LayoutError(f"{self.name} on --cluster", self.evaluation.cluster.name, self.evaluation.misfit, REMEDY)

    @property
    def steps(self) -> int:
        return self.run.train.train_iters

    @property
    def hours(self) -> float:
        """Of the whole stage; 0 where it was not judged."""
        return self.evaluation.hours(self.steps) if self.evaluation else 0.0

    @property
    def floor_hours(self) -> float:
        """The same if the chips reached their peak all the time."""
        return self.hours * self.evaluation.mfu if self.evaluation else 0.0


@dataclass(frozen=True)
class Totals:
    """What the stages that work come to."""

    works: int
    hours: float
    floor_hours: float
    gpu_hours: float

    @classmethod
    def of(cls, plans: Sequence[StagePlan], cluster: Cluster) -> Totals:
        """Of a model's stages."""
        works = [plan for plan in plans if plan.problem is None]
        hours = sum(plan.hours for plan in works)
        return cls(len(works), hours, sum(plan.floor_hours for plan in works), hours * cluster.gpus)


@dataclass
class Planner:
    """What plans of several stages share."""

    cluster: Cluster
    efficiency: Efficiency
    decoding: Decoding
    from_data: bool
    progress: Callable[[str], None] = lambda _: None
    _found: dict[tuple[str, ...], tuple[str, Choice]] = field(default_factory=dict)
    """What learns -> a stage and the layout that was found for it."""
    _traces: Traces = field(default_factory=Traces)

    def given(self, name: str, run: RunConfig) -> StagePlan:
        """In the run's own layout."""
        rate_of(run, self.cluster, self.efficiency)  # refuses number formats that the chip lacks, before a trace
        evaluation, mix = self.judged(run)
        loading = loading_of(run, evaluation, mix, self.decoding)
        return StagePlan(name=name, asked=run, run=run, evaluation=evaluation, mix=mix, loading=loading)

    def found(self, name: str, run: RunConfig, budget: Budget = ALONE) -> StagePlan:
        """In the layout of a stage before where the same parts learn and it fits; else in the fastest that is found."""
        rate_of(run, self.cluster, self.efficiency)  # no layout is to blame for a number format that the chip lacks
        known = self._in_known_layout(name, run)
        if known is not None:
            return known
        found = self._searched(run, budget)
        if not found.best:
            return self._in_own_layout(name, run, found)
        evaluation = found.best[0].evaluation
        self._found[run.trainable] = (name, evaluation.choice)
        return self._in_layout(name, run, evaluation, search=found)

    def judged(self, run: RunConfig, choice: Choice | None = None) -> tuple[Evaluation, Mix]:
        """The run in its own layout, which `choice` asked for."""
        mix = mix_of(run, self.from_data)
        found = judge(run, self.cluster, mix, self.efficiency, choice, self._traces)
        return with_loading(run, found, mix, self.decoding), mix

    def _in_layout(
        self,
        name: str,
        run: RunConfig,
        evaluation: Evaluation,
        search: SearchResult | None = None,
        layout_of: str | None = None,
    ) -> StagePlan:
        chosen = evaluation.choice.apply(run)
        mix = mix_of(chosen, self.from_data)
        return StagePlan(
            name=name,
            asked=run,
            run=chosen,
            options=evaluation.choice.options(run),
            evaluation=evaluation,
            mix=mix,
            loading=loading_of(chosen, evaluation, mix, self.decoding),
            search=search,
            layout_of=layout_of,
        )

    def _in_known_layout(self, name: str, run: RunConfig) -> StagePlan | None:
        if run.trainable not in self._found:
            return None
        before, choice = self._found[run.trainable]
        choice = with_rows(run, replace(choice, rows_multiple=None), self.cluster)
        self.progress(f"{choice.name}, as for {before}")
        try:
            evaluation = self.judged(choice.apply(run), choice)[0]
        except MegavlmError:
            return None  # what the trainer refuses here, the search finds another layout for
        return self._in_layout(name, run, evaluation, layout_of=before) if evaluation.fits else None

    def _in_own_layout(self, name: str, run: RunConfig, found: SearchResult) -> StagePlan:
        """Where the search has no answer: it says by how much the run's own layout misses, if it can be judged."""
        try:
            return replace(self.given(name, run), search=found)
        except MegavlmError as error:
            return StagePlan(name=name, asked=run, run=run, search=found, refused=error)

    def _searched(self, run: RunConfig, budget: Budget) -> SearchResult:
        mix = mix_of(run, self.from_data)  # what cannot be read is no layout's fault: it is said once, by itself
        return search(
            run,
            self.cluster,
            lambda choice: self.judged(choice.apply(run), choice)[0],
            rows=StepRows.of(mix),
            most_traces=budget.traces,
            progress=self.progress,
            is_late=Clock(budget.seconds).is_late,
        )

    def scaled(self, plan: StagePlan) -> StagePlan:
        """With the judged layouts on other numbers of GPUs, and further ones where those cannot use them."""
        if plan.evaluation is None or plan.mix is None:
            return plan
        run, mix, clock = plan.asked, plan.mix, Clock(SCALE_SECONDS)
        known = list(plan.search.evaluations) if plan.search else []
        known.sort(key=lambda one: one is not plan.evaluation)
        first = known[0] if known else plan.evaluation

        @functools.cache
        def mix_in(rows_multiple: int | None, micro_batch: int | None) -> Mix:
            return mix_of(Choice(rows_multiple=rows_multiple, micro_batch=micro_batch).apply(run), self.from_data)

        def mix_of_choice(choice: Choice) -> Mix:
            return mix_in(choice.rows_multiple, choice.micro_batch)

        points = scale(
            run,
            known or [plan.evaluation],
            rate_of(run, self.cluster, self.efficiency),
            rows=lambda choice: mix_of_choice(choice).rows,
            drawn=lambda traced, microbatches, copies: drawn_of(mix_of_choice(traced), microbatches, copies),
            further=Promising(
                run,
                [self.cluster.with_gpus(count) for count in counts(self.cluster)],
                Guesser(run, StepRows.of(mix_in(None, None))),
                lambda choice, cluster: judge(
                    choice.apply(run),
                    cluster,
                    mix_of_choice(choice),
                    self.efficiency,
                    choice,
                    self._traces,
                ),
                rows_of(first),
                clock.is_late,
                f"not looked at to the end: no layout was traced beyond {SCALE_SECONDS:.0f} s",
                self.progress,
            ),
            finished=lambda one: with_loading(run, one, mix, self.decoding),
        )
        return replace(plan, scale=points)


class Clock:
    """Whether another trace would end too late, if it takes as long as those before; asked ahead of each."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds, self.asked = time.monotonic(), seconds, 0

    def is_late(self) -> bool:
        """To be asked ahead of each trace."""
        passed = time.monotonic() - self.began
        of_one = passed / self.asked if self.asked else 0.0
        is_late = passed + of_one > self.seconds
        self.asked += not is_late
        return is_late
