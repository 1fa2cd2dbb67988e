"""The search for a layout: all that the trainer would accept, ordered by an estimate, judged until the answer is clear.

Judging traces the model and costs seconds; so it is asked for as few layouts as needed. One whose weights alone do not
fit is never traced, nor one that computes again what fits without, nor one that keeps more than what did not fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megavlm.build.run_config import RunConfig, check_for_world
from megavlm.errors import ConfigError, MegavlmError
from megavlm.plan.choice import RECOMPUTE, Choice
from megavlm.plan.cluster import GIB, Cluster
from megavlm.plan.evaluation import SLACK, Evaluation
from megavlm.plan.step import BUBBLE, IMBALANCE, MESSAGES

Evaluate = Callable[[Choice], Evaluation]
"""Traces the run in this layout and judges it; raises what the trainer would."""

BEST = 5
"""Layouts that are printed, and failures."""
MOST_TRACES = 16
MOST_CHUNKS = (1, 2, 4)
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE_COST = {"none": 0.0, "selective": 0.15, "full": 1 / 3}
"""More work than a step's own, estimated, for the order of tries alone."""
REACHED = 0.5
"""Share of the peak that the estimate takes products to reach."""
_KEPT = {"none": 34.0, "selective": 18.0, "full": 2.0}
"""Bytes of activations a token and hidden channel that a layer holds, for the order of tries alone (Korthikanti et al.
2022, equation 2 without the scores)."""


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
            yield with_rows(run, choice, cluster)


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
    most_traces: int = MOST_TRACES,
    choices: Sequence[Choice] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    is_late: Callable[[], bool] = lambda: False,
) -> SearchResult:
    """The layouts ranked by predicted step time, judged from the most promising on, until there have been so many
    traces or it is late."""
    all_choices = list(candidates(run, cluster)) if choices is None else list(choices)
    refused: list[Failure] = []
    accepted: list[Choice] = []
    for choice in all_choices:
        problem = refusal(run, choice, cluster)
        if problem is None:
            accepted.append(choice)
        else:
            refused.append(Failure(choice, problem))
    judged = _Judged(evaluate, most_traces, progress, is_late)
    guesses = {choice: _guess(run, choice, cluster) for choice in accepted}
    while accepted:
        # What has been judged tells how far the guesses of memory are off, and so what to try next.
        scale = judged.scale(guesses)
        accepted.sort(key=lambda choice: guesses[choice].order(scale, cluster), reverse=True)
        judged.consider(accepted.pop())
    row_tokens = run.data.rows.max_tokens if run.data else None
    return dataclasses.replace(_result(len(all_choices), refused, judged), row_tokens=row_tokens)


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


def layer_parameters(run: RunConfig) -> int:
    """Of one decoder layer's products."""
    decoder = run.decoder
    heads = (decoder.num_attention_heads * 2 + decoder.num_query_groups * 2) * decoder.kv_channels
    return decoder.hidden_size * (heads + 3 * decoder.ffn_hidden_size)


def weight_floor(run: RunConfig, choice: Choice, cluster: Cluster) -> float:
    """Bytes that a stage holds at the least, whatever it does: its layers' weights, and what training them takes."""
    parameters = layer_parameters(run) * -(-run.decoder.num_layers // choice.pipeline) / choice.tensor
    each = 2.0 if run.precision.dtype.itemsize == 2 else 4.0
    if "decoder" in run.trainable:
        state = 12.0 if each == 2.0 else 8.0
        data = choice.data_parallel(cluster.gpus) if run.data_parallel.use_distributed_optimizer else 1
        each += (4.0 if run.data_parallel.grad_reduce_in_fp32 else each) + state / data
    return parameters * each


class _Guess(NamedTuple):
    """A rough idea of a layout, which only decides what is tried first."""

    static: float
    activations: float
    seconds: float
    """Of a GPU, for a row."""

    def order(self, scale: float, cluster: Cluster) -> tuple[bool, float, float]:
        needed = (self.static + scale * self.activations) * (1 + SLACK)
        return needed > cluster.chip.memory_bytes, self.seconds, needed


def _guess(run: RunConfig, choice: Choice, cluster: Cluster) -> _Guess:
    tokens = _row_tokens(run, choice)
    layers = run.decoder.num_layers
    flops = 6.0 * layer_parameters(run) * layers * tokens / choice.model_parallel
    compute = flops / (REACHED * cluster.chip.bf16_tflops * 1e12) * (1 + RECOMPUTE_COST[choice.recompute])
    size = tokens * run.decoder.hidden_size * 2.0
    span = cluster.span("tp", choice.tensor, choice.pipeline)
    compute += 4 * layers / choice.pipeline * cluster.collective_seconds("all_reduce", size, span)
    microbatches = max(1.0, _rows(run) / choice.data_parallel(cluster.gpus))
    bubble = (choice.pipeline - 1) / (microbatches * choice.chunks)
    held = min(microbatches, choice.pipeline) * (1 + (choice.chunks > 1)) * layers / choice.pipeline
    activations = _KEPT[choice.recompute] * tokens * run.decoder.hidden_size * held / choice.tensor
    # What the tower does on the first stage alone holds all others up.
    uneven = 0.0 if choice.towers_everywhere or choice.model_parallel == 1 else 0.01
    seconds = compute * (1 + bubble + uneven) * choice.model_parallel
    return _Guess(weight_floor(run, choice, cluster), activations, seconds)


def _row_tokens(run: RunConfig, choice: Choice) -> float:
    if run.data is None:
        return run.row_tokens * (choice.micro_batch or run.train.micro_batch_size)
    return run.data.rows.max_tokens


def _rows(run: RunConfig) -> float:
    """Of a step, as many as there are at the least."""
    if run.data is None:
        return run.samples_per_step / run.train.micro_batch_size
    return max(run.data.rows.rows_multiple, run.samples_per_step / 16)


@dataclass
class _Judged:
    """What is known so far, and what follows from it for layouts that differ in recompute alone."""

    evaluate: Evaluate
    most_traces: int
    progress: Callable[[str], None]
    is_late: Callable[[], bool]
    traced: int = 0
    untried: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def scale(self, guesses: Mapping[Choice, _Guess]) -> float:
        """How many times the guessed activations (and all else that is no weight) there really are."""
        ratios = [
            max((one.needed / (1 + SLACK) - guess.static) / guess.activations, 0.01)
            for one in self.evaluations
            if (guess := guesses[one.choice]).activations
        ]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0

    def consider(self, choice: Choice) -> None:
        alike = [known for known in self.evaluations if _without_recompute(known.choice) == _without_recompute(choice)]
        level = RECOMPUTE.index(choice.recompute)
        if any(known.fits and RECOMPUTE.index(known.choice.recompute) <= level for known in alike):
            return
        misfits = [known for known in alike if not known.fits]
        if any(RECOMPUTE.index(known.choice.recompute) >= level for known in misfits):
            return
        if self.traced >= self.most_traces or self.is_late():
            self.untried += 1
            return
        self.traced += 1
        self.progress(f"{self.traced}: {choice.name}")
        try:
            evaluation = self.evaluate(choice)
        except MegavlmError as error:
            self.failures.append(Failure(choice, str(error)))
            return
        self.evaluations.append(evaluation)
        if not evaluation.fits:
            self.failures.append(Failure(choice, evaluation.misfit))


def _without_recompute(choice: Choice) -> Choice:
    return dataclasses.replace(choice, recompute="none")


def _result(considered: int, refused: list[Failure], judged: _Judged) -> SearchResult:
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
        untried=judged.untried,
    )


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
