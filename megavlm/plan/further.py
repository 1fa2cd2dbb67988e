"""Further layouts for other numbers of GPUs: the one that promises the most over all that is known is judged next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from megavlm.build.run_config import RunConfig
from megavlm.errors import MegavlmError
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.guess import Corrected, Estimate, Guesser
from megavlm.plan.scale import Timed, rows_suffice
from megavlm.plan.search import candidates, refusal

WORTH = 0.05
"""Share of the step that a layout must promise to save."""


@dataclass
class Promising:
    """Judges, one at a time, the layout that is thought to save the largest share of a step somewhere."""

    run: RunConfig
    clusters: list[Cluster]
    guesser: Guesser
    evaluate: Callable[[Choice, Cluster], Evaluation]
    rows: int
    """Of a step: there are no more copies of the model."""
    is_late: Callable[[], bool]
    late: str
    """What is said of what was not looked at because it was late."""
    progress: Callable[[str], None] = lambda _: None
    _sizes: dict[int, _Size] = field(default_factory=dict)
    _cut_short: bool = False

    def __post_init__(self) -> None:
        for cluster in self.clusters:
            self._sizes[cluster.gpus] = _Size(cluster, self.guesser, dict(self._guessed(cluster)))

    def more(self, timed: Timed) -> Evaluation | None:
        """The next layout, judged."""
        for gpus, known in timed.items():
            self._sizes[gpus].learn(known)
        while promising := [(size.saved(one), size, one) for size in self._sizes.values() if (one := self._next(size))]:
            saved, size, estimate = max(promising, key=lambda one: one[0])
            if saved < WORTH:
                return None
            if self.is_late():
                self._cut_short = True
                return None
            if found := self._judged(size, estimate.choice):
                return found
        return None

    def unseen(self) -> str | None:
        """Why not all was looked at."""
        return self.late if self._cut_short else None

    def _judged(self, size: _Size, choice: Choice) -> Evaluation | None:
        size.left.pop(_alike(choice))
        if refusal(self.run, choice, size.cluster):
            return None
        self.progress(f"{size.cluster.gpus:,} GPUs: {choice.name}")
        try:
            return self.evaluate(choice, size.cluster)
        except MegavlmError:
            return None  # what the trainer refuses is no layout for it

    def _next(self, size: _Size) -> Estimate | None:
        """The most promising layout of a number of GPUs; what was learned at the nearest one stands in for its own."""
        nearest = min(
            (other for other in self._sizes.values() if other.corrected.seen),
            key=lambda other: abs(other.cluster.gpus - size.cluster.gpus),
            default=size,
        )
        return size.next(size.corrected if size.corrected.seen else size.corrected.with_seen_of(nearest.corrected))

    def _guessed(self, cluster: Cluster) -> Iterator[tuple[Choice, Choice]]:
        """Layouts in which each copy of the model gets a row, and stages that take turns as many as they are."""
        for choice in candidates(self.run, cluster):
            if rows_suffice(self.run, choice, cluster, self.rows):
                yield _alike(choice), choice


class _Size:
    """What is thought of one number of GPUs."""

    def __init__(self, cluster: Cluster, guesser: Guesser, left: dict[Choice, Choice]) -> None:
        self.cluster, self.guesser, self.left = cluster, guesser, left
        guesses = {}
        for alike, choice in list(left.items()):
            try:
                guesses[choice] = guesser.guess(choice, cluster)
            except MegavlmError:
                del left[alike]
        self.corrected = Corrected(guesses)
        self.best: float | None = None
        self.learned = 0

    def learn(self, known: Sequence[Evaluation]) -> None:
        """From all layouts that are known here."""
        for one in known[self.learned :]:
            self.left.pop(_alike(one.choice), None)
            self.corrected.learn(one, self.guesser.guess(one.choice, self.cluster))
        self.learned = len(known)
        self.best = min((one.seconds for one in known if one.fits), default=None)

    def next(self, corrected: Corrected) -> Estimate | None:
        """Of those that are thought to fit the fastest."""
        estimates = (corrected.estimate(choice) for choice in self.left.values())
        return min((one for one in estimates if one.fits(self.cluster)), key=lambda one: one.seconds, default=None)

    def saved(self, estimate: Estimate) -> float:
        """Share of the best known step; all of it where none is known."""
        return 1.0 if self.best is None else 1 - estimate.seconds / self.best


def _alike(choice: Choice) -> Choice:
    """The same at every number of GPUs."""
    return replace(choice, rows_multiple=None)
