"""The search for a layout: all that the trainer would accept, ordered by an estimate, judged until the answer is clear.

Judging traces the model and costs seconds; so it is asked for as few layouts as needed. One whose weights alone do not
fit is never traced, nor one that computes again what fits without, nor one that keeps more than what did not fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megavlm.build.run_config import RunConfig, check_for_world
from megavlm.errors import ConfigError, MegavlmError
from megavlm.plan.choice import RECOMPUTE, Choice
from megavlm.plan.cluster import GIB, Cluster
from megavlm.plan.evaluation import SLACK, Evaluation
from megavlm.plan.guess import Corrected, Estimate, Guess, Guesser, StepRows, weight_floor
from megavlm.plan.step import BUBBLE, IMBALANCE, MESSAGES

Evaluate = Callable[[Choice], Evaluation]
"""Traces the run in this layout and judges it; raises what the trainer would."""

BEST = 5
"""Layouts that are printed, and failures."""
MOST_TRACES = 16
NO_DIFFERENCE = 0.03
"""Between the logarithms of two estimates."""
MOST_CHUNKS = (1, 2, 4)
MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Failure:
    """A layout that does not work."""

    choice: Choice
    reason: str


@dataclass(frozen=True)
class Ranked:
    """A layout that works, and why it stands where it does."""

    evaluation: Evaluation
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """The fastest layouts, the fastest ones that fail, and how much was looked at."""

    best: tuple[Ranked, ...]
    failures: tuple[Failure, ...]
    considered: int
    refused: int
    """By the trainer itself, before anything is traced."""
    traced: int
    evaluations: tuple[Evaluation, ...] = ()
    """All that were judged."""
    untried: int = 0
    """Neither judged nor ruled out when the number of traces was used up."""
    next: tuple[Estimate, ...] = ()
    """Of those that were not tried the fastest that are thought to fit."""
    misfits: tuple[Estimate, ...] = ()
    """Of those that were not tried the fastest that are thought not to fit."""
    row_tokens: int | None = None
    """Of prepared data the longest row, which is a microbatch: the search keeps the run's. None: of toy text,
    whose micro-batches are searched."""


def candidates(run: RunConfig, cluster: Cluster) -> Iterator[Choice]:
    """Layouts of a run on a cluster: tensor parallelism within a node, and whatever divides the GPUs."""
    trained_tower = "tower" in run.trainable
    has_tower = run.infimm is not None or run.aquila_vl is not None
    micro: Sequence[int | None] = MICRO_BATCHES if run.data is None else (None,)
    for tensor, pipeline in itertools.product(_divisors(cluster.gpus_per_node), _divisors(cluster.gpus)):
        if cluster.gpus % (tensor * pipeline) or pipeline > run.decoder.num_layers:
            continue
        for chunks, everywhere, recompute, batch in itertools.product(
            MOST_CHUNKS if pipeline > 1 else (1,),
            (False, True) if has_tower and not trained_tower and tensor * pipeline > 1 else (False,),
            RECOMPUTE,
            micro,
        ):
            if pipeline * chunks > run.decoder.num_layers:
                continue
            choice = Choice(
                tensor=tensor,
                pipeline=pipeline,
                chunks=chunks,
                sequence_parallel=tensor > 1,
                recompute=recompute,
                towers_everywhere=everywhere,
                micro_batch=batch,
            )
            choice = with_rows(run, choice, cluster)
            # Stages that take turns on rows of which some stay empty lose what the turns gain.
            if chunks == 1 or (choice.rows_multiple or 0) <= run.samples_per_step:
                yield choice


def with_rows(run: RunConfig, choice: Choice, cluster: Cluster) -> Choice:
    """With the next number of rows that all data-parallel ranks can share, where the run's own cannot be shared."""
    if run.data is None:
        return choice
    at_once = choice.data_parallel(cluster.gpus) * (choice.pipeline if choice.chunks > 1 else 1)
    multiple = run.data.rows.rows_multiple
    shared = None if multiple % at_once == 0 else -(-multiple // at_once) * at_once
    return dataclasses.replace(choice, rows_multiple=shared)


def search(
    run: RunConfig,
    cluster: Cluster,
    evaluate: Evaluate,
    *,
    rows: StepRows | None = None,
    most_traces: int = MOST_TRACES,
    choices: Sequence[Choice] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    is_late: Callable[[], bool] = lambda: False,
) -> SearchResult:
    """The layouts ranked by predicted step time, judged from the most promising on, until there have been so many
    traces or it is late."""
    all_choices = list(candidates(run, cluster)) if choices is None else list(choices)
    guesser, guesses = Guesser(run, rows), dict[Choice, Guess]()
    refused: list[Failure] = []
    for choice in all_choices:
        problem = refusal(run, choice, cluster)
        if problem is None:
            try:
                guesses[choice] = guesser.guess(choice, cluster)
            except MegavlmError as error:  # as building the model would
                problem = str(error)
        if problem is not None:
            refused.append(Failure(choice, problem))
    judged = _Judged(evaluate, most_traces, progress, is_late, Corrected(guesses))
    accepted = list(guesses)
    while accepted:
        # What has been judged tells how far the guesses are off, and so what to try next.
        accepted.sort(key=lambda choice: _order(judged.corrected.estimate(choice), cluster), reverse=True)
        judged.consider(accepted.pop())
    row_tokens = run.data.rows.max_tokens if run.data else None
    return dataclasses.replace(_result(len(all_choices), refused, judged, cluster), row_tokens=row_tokens)


def refusal(run: RunConfig, choice: Choice, cluster: Cluster) -> str | None:
    """Why a layout can be told not to work without a trace, in the trainer's own words where it is the trainer's."""
    try:
        chosen = choice.apply(run)
        check_for_world(chosen, cluster.gpus)
    except ConfigError as error:
        return str(error)
    floor = weight_floor(run, choice, cluster) * (1 + SLACK)
    if floor > cluster.chip.memory_bytes:
        over = (floor - cluster.chip.memory_bytes) / GIB
        what = (
            "the decoder's weights, gradients and optimizer" if "decoder" in run.trainable else "the decoder's weights"
        )
        return f"{what} alone need {floor / GIB:.1f} GiB a GPU, {over:.1f} more than there are"
    return None


def _order(estimate: Estimate, cluster: Cluster) -> tuple[bool, int, int, float, float]:
    """Fitting ones first, then fast ones; of about equal ones those with few chunks, whose traces take less time."""
    about = round(math.log(estimate.seconds) / NO_DIFFERENCE)
    chunks = estimate.choice.pipeline * estimate.choice.chunks
    return not estimate.fits(cluster), about, chunks, estimate.seconds, estimate.needed


@dataclass
class _Judged:
    """What is known so far, and what follows from it for layouts that differ in recompute alone."""

    evaluate: Evaluate
    most_traces: int
    progress: Callable[[str], None]
    is_late: Callable[[], bool]
    corrected: Corrected
    traced: int = 0
    untried: list[Choice] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def consider(self, choice: Choice) -> None:
        alike = [known for known in self.evaluations if _without_recompute(known.choice) == _without_recompute(choice)]
        level = RECOMPUTE.index(choice.recompute)
        if any(known.fits and RECOMPUTE.index(known.choice.recompute) <= level for known in alike):
            return
        misfits = [known for known in alike if not known.fits]
        if any(RECOMPUTE.index(known.choice.recompute) >= level for known in misfits):
            return
        if self.traced >= self.most_traces or self.is_late():
            self.untried.append(choice)
            return
        self.traced += 1
        self.progress(f"{self.traced}: {choice.name}")
        try:
            evaluation = self.evaluate(choice)
        except MegavlmError as error:
            self.failures.append(Failure(choice, str(error)))
            return
        self.evaluations.append(evaluation)
        self.corrected.learn(evaluation)
        if not evaluation.fits:
            self.failures.append(Failure(choice, evaluation.misfit))


def _without_recompute(choice: Choice) -> Choice:
    return dataclasses.replace(choice, recompute="none")


def _result(considered: int, refused: list[Failure], judged: _Judged, cluster: Cluster) -> SearchResult:
    estimates = [judged.corrected.estimate(choice) for choice in judged.untried]
    fitting = sorted((one for one in judged.evaluations if one.fits), key=lambda one: one.seconds)
    best = fitting[:BEST]
    # Those that were judged came nearest; then the simplest of what was refused.
    refusals = sorted(refused, key=lambda failure: (failure.choice.model_parallel, failure.choice.chunks))
    failures = _different([*judged.failures, *refusals])
    return SearchResult(
        best=tuple(Ranked(one, reason(one, best[0])) for one in best),
        failures=tuple(failures[:BEST]),
        considered=considered,
        refused=len(refused),
        traced=judged.traced,
        evaluations=tuple(judged.evaluations),
        untried=len(judged.untried),
        next=tuple(_nearest(estimates, fits=True, cluster=cluster)),
        misfits=tuple(_nearest(estimates, fits=False, cluster=cluster)),
    )


def _nearest(estimates: Sequence[Estimate], *, fits: bool, cluster: Cluster) -> list[Estimate]:
    """The fastest by estimate, one of those that differ in recompute alone: nobody recomputes more than is needed."""
    found: dict[Choice, Estimate] = {}
    for one in sorted(estimates, key=lambda one: (one.seconds, one.needed)):
        if one.fits(cluster) == fits:
            found.setdefault(_without_recompute(one.choice), one)
    return list(found.values())[:BEST]


def _different(failures: Sequence[Failure]) -> list[Failure]:
    """Those that tell something new: one of each reason."""
    seen: set[str] = set()
    found = []
    for failure in failures:
        if failure.reason not in seen:
            seen.add(failure.reason)
            found.append(failure)
    return found


def reason(evaluation: Evaluation, fastest: Evaluation) -> str:
    """Why a layout stands where it does: what it loses, and what it leaves free."""
    step = evaluation.step
    losses = {
        "bubble": step.share(BUBBLE),
        "messages between stages": step.share(MESSAGES),
        "uneven images": step.share(IMBALANCE),
        "waiting for data": step.share("data"),
        **{f"{_GROUPS.get(name, name)} messages": part / step.seconds for name, part in step.groups.items()},
    }
    worth_saying = sorted(((name, share) for name, share in losses.items() if share >= 0.01), key=lambda pair: -pair[1])
    said = [f"{name} {100 * share:.0f} %" for name, share in worth_saying[:3]]
    if evaluation.choice.recompute != "none":
        said.append(f"computes again ({evaluation.choice.recompute})")
    said.append(f"{-evaluation.over / GIB:.0f} GiB left")
    if evaluation is not fastest:
        said.insert(0, f"{100 * (evaluation.seconds / fastest.seconds - 1):.1f} % slower")
    return ", ".join(said)


_GROUPS = {"tp": "tensor-parallel", "dp": "data-parallel", "mp": "model-parallel", "world": "all ranks'"}


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
