"""A rough idea of a layout's time and memory without a trace, and what judged layouts teach about all others.

It only decides what is traced next, and what is said, as an estimate, of layouts that were not traced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megavlm.build.costs import Work, causal_work, part_costs
from megavlm.build.model import with_layout
from megavlm.build.run_config import RunConfig
from megavlm.model.flops import gated_block_flops, siglip_flops
from megavlm.parallel.layout import layers_of_chunks
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster
from megavlm.plan.evaluation import SLACK, Evaluation
from megavlm.plan.mix import Mix
from megavlm.plan.step import SHAPE_BYTES

RECOMPUTE_COST = {"none": 0.0, "selective": 0.15, "full": 1 / 3}
"""More work than a step's own."""
REACHED = 0.5
"""Share of the peak that products are taken to reach, all between them included."""
UPDATE_BYTES = 100.0
"""Read and written to update one weight."""
_KEPT = {"none": 34.0, "selective": 18.0, "full": 2.0}
"""Bytes of activations a token and hidden channel that a layer holds (Korthikanti et al. 2022, equation 2 without the
scores)."""
_ALIKE = {"tensor": 0.2, "pipeline": 0.5, "chunks": 0.5, "recompute": 0.5, "towers_everywhere": 0.7, "micro_batch": 0.7}
"""How much less a judged layout says of one that differs in this."""


@dataclass(frozen=True)
class StepRows:
    """What a step is made of."""

    rows: float
    tokens: float
    """Of a row."""
    work: Work
    """Of the whole step."""

    @classmethod
    def of(cls, mix: Mix) -> StepRows:
        """As drawn from the data."""
        return cls(mix.rows, mix.tokens / mix.rows, mix.work)

    @classmethod
    def full(cls, run: RunConfig) -> StepRows:
        """Where nothing is known of the data: full rows."""
        if run.data is None:
            rows, tokens = float(run.samples_per_step), float(run.row_tokens)
        else:
            rows = float(max(run.data.rows.rows_multiple, run.samples_per_step // 16))
            tokens = float(run.data.rows.max_tokens)
        tiles = rows * run.train.images_per_row
        return cls(rows, tokens, causal_work(rows * tokens, rows * tokens**2, tiles, rows * tokens if tiles else 0.0))

    def shared(self, choice: Choice, run: RunConfig) -> tuple[float, float]:
        """(rows, tokens of each) as the layout has them: spread over more rows, or several toy rows at once."""
        if run.data is None:
            at_once = choice.micro_batch or run.train.micro_batch_size
            rows = run.samples_per_step / at_once
        else:
            multiple = choice.rows_multiple or run.data.rows.rows_multiple
            rows = float(math.ceil(self.rows / multiple) * multiple)
        return rows, self.rows * self.tokens / rows


def layer_parameters(run: RunConfig) -> int:
    """Of one decoder layer's products."""
    decoder = run.decoder
    heads = (decoder.num_attention_heads * 2 + decoder.num_query_groups * 2) * decoder.kv_channels
    return decoder.hidden_size * (heads + 3 * decoder.ffn_hidden_size)


def weight_floor(run: RunConfig, choice: Choice, cluster: Cluster) -> float:
    """Bytes that a stage holds at the least, whatever it does: its layers' weights, and what training them takes."""
    parameters = layer_parameters(run) * -(-run.decoder.num_layers // choice.pipeline) / choice.tensor
    return parameters * _bytes_of_parameter(run, choice, cluster, learns="decoder" in run.trainable)


def _bytes_of_parameter(run: RunConfig, choice: Choice, cluster: Cluster, learns: bool) -> float:
    """Weights, and of those that learn gradients and the optimizer's share."""
    each = 2.0 if run.precision.dtype.itemsize == 2 else 4.0
    if not learns:
        return each
    state = 12.0 if each == 2.0 else 8.0
    data = choice.data_parallel(cluster.gpus) if run.data_parallel.use_distributed_optimizer else 1
    return each + (4.0 if run.data_parallel.grad_reduce_in_fp32 else each) + state / data


class Guess(NamedTuple):
    """Of one layout."""

    static: float
    """Bytes of weights, gradients and optimizer on a stage."""
    activations: float
    """Bytes of all else."""
    seconds: float
    """Of a step."""


class Estimate(NamedTuple):
    """A guess, corrected by what has been judged."""

    choice: Choice
    seconds: float
    needed: float
    """Bytes, with what the allocator loses."""

    def fits(self, cluster: Cluster) -> bool:
        return self.needed <= cluster.chip.memory_bytes


class Guesser:
    """Guesses layouts of one run; what does not depend on the layout is reckoned once."""

    def __init__(self, run: RunConfig, step: StepRows | None = None) -> None:
        self.run = run
        self.step = step or StepRows.full(run)
        self.costs = part_costs(run, self.step.work)
        self._cuts: dict[tuple[object, ...], list[int]] = {}

    def guess(self, choice: Choice, cluster: Cluster) -> Guess:
        """What a layout comes to; refused where the trainer would refuse it."""
        cut = (choice.pipeline, choice.chunks, choice.towers_everywhere)
        if cut not in self._cuts:
            parallel = with_layout(choice.apply(self.run)).parallel
            self._cuts[cut] = layers_of_chunks(parallel, self.run.decoder.num_layers)
        return _OfLayout(self, choice, cluster, self._cuts[cut]).guess()


class _OfLayout:
    def __init__(self, guesser: Guesser, choice: Choice, cluster: Cluster, layers: Sequence[int]) -> None:
        self.run, self.costs = guesser.run, guesser.costs
        self.choice, self.cluster, self.layers = choice, cluster, layers
        self.copies = choice.data_parallel(cluster.gpus)
        self.rows, self.tokens = guesser.step.shared(choice, self.run)
        self.microbatches = math.ceil(self.rows / self.copies)

    def guess(self) -> Guess:
        held = self._most_layers() * _gated_share(self.run)
        learning, frozen = self._parameters()
        static = max(
            weight_floor(self.run, self.choice, self.cluster),
            learning * _bytes_of_parameter(self.run, self.choice, self.cluster, learns=True)
            + frozen * _bytes_of_parameter(self.run, self.choice, self.cluster, learns=False),
        )
        in_flight = min(self.microbatches, self.choice.pipeline) * (1 + (self.choice.chunks > 1))
        kept = _KEPT[self.choice.recompute] * self.tokens * self.run.decoder.hidden_size
        return Guess(static, kept * held * in_flight / self.choice.tensor, self._passes() + self._ending(learning))

    def _most_layers(self) -> int:
        stages = self.choice.pipeline
        return max(sum(self.layers[stage::stages]) for stage in range(stages))

    def _parameters(self) -> tuple[float, float]:
        """(learning, frozen) of the stage that holds most."""
        run, tensor = self.run, self.choice.tensor
        layers = self._most_layers()
        vocabulary = run.decoder.vocab_size * run.decoder.hidden_size * (2 if self.choice.pipeline == 1 else 1)
        parts = {
            "decoder": (layers * layer_parameters(run) + vocabulary) / tensor,
            "cross_attention": layers / run.decoder.num_layers * _gated_parameters(run) / tensor,
            "tower": _tower_parameters(run),
        }
        learning = sum(number for part, number in parts.items() if part in run.trainable)
        return learning, sum(parts.values()) - learning

    def _passes(self) -> float:
        """Seconds of the microbatches through the pipeline."""
        stages, chunks = self.choice.pipeline, self.choice.chunks
        every, ahead = self._chunks()
        of_stages = [sum(every[stage::stages]) for stage in range(stages)]
        busiest = max(of_stages)
        fill = (sum(of_stages) - busiest) / chunks
        return self.microbatches * (busiest + ahead) + fill + self._messages()

    def _chunks(self) -> tuple[list[float], float]:
        """(seconds of a row in each chunk, forward and backward; of a tower ahead of them)."""
        run, choice = self.run, self.choice
        costs = self.costs
        rate = self.rows * choice.tensor * REACHED * self.cluster.chip.bf16_tflops * 1e12
        again = 1 + RECOMPUTE_COST[choice.recompute]
        layers = [again * (layer + gated) / rate for layer, gated in zip(costs.layers, costs.gated, strict=True)]
        message = self.tokens * run.decoder.hidden_size * run.precision.dtype.itemsize
        span = self.cluster.span("tp", choice.tensor, choice.pipeline)
        between = 4 * self.cluster.collective_seconds("all_reduce", message, span) * _gated_share(run)
        seconds, first = [], 0
        for count in self.layers:
            seconds.append(sum(layers[first : first + count]) + count * between)
            first += count
        seconds[0] += (costs.connector + (0.0 if choice.towers_everywhere else costs.tower)) / rate
        seconds[-1] += costs.head / rate
        return seconds, costs.tower / rate / choice.pipeline if choice.towers_everywhere else 0.0

    def _messages(self) -> float:
        """Seconds that stages wait for what is sent between them, counted in simulated schedules.

        One chunk a stage: each message holds both its ends up. Interleaved, they pass beside the work, but for the
        shape that goes ahead of each.
        """
        choice, run = self.choice, self.run
        stages, chunks, rows = choice.pipeline, choice.chunks, self.microbatches
        if stages == 1:
            return 0.0
        size = self.tokens * run.decoder.hidden_size * run.precision.dtype.itemsize
        size /= choice.tensor if choice.sequence_parallel else 1
        far = any(self.cluster.crossings(choice.tensor, stages))
        whole, shape = self.cluster.p2p_seconds(size, far), self.cluster.p2p_seconds(SHAPE_BYTES, far)
        if chunks > 1:
            return 2 * (stages * chunks - 1) * whole + 2 * rows * chunks * shape
        times = rows + 1 if stages == 2 else 2 * rows + 1.5 * stages
        return times * (whole + shape)

    def _ending(self, learning: float) -> float:
        """Seconds of reducing gradients, updating weights and gathering them."""
        settings, width = self.run.data_parallel, self.run.precision.dtype.itemsize
        gradients = learning * (4 if settings.grad_reduce_in_fp32 else width)
        span = self.cluster.span("dp", self.choice.tensor, self.choice.pipeline)
        shards = self.copies if settings.use_distributed_optimizer else 1
        update = (gradients + UPDATE_BYTES * learning / shards) / self.cluster.chip.bytes_per_second
        if shards == 1:
            return update + self.cluster.collective_seconds("all_reduce", gradients, span)
        reduced = self.cluster.collective_seconds("reduce_scatter", gradients, span)
        return update + reduced + self.cluster.collective_seconds("all_gather", learning * width, span)


def _gated_share(run: RunConfig) -> float:
    """Layers and gated blocks, over layers."""
    return 1 + 1 / run.infimm.cross_attention.every_n_layers if run.infimm else 1.0


def _gated_parameters(run: RunConfig) -> float:
    """Of all gated blocks: their products for one token and one latent, a multiply-add counting two."""
    if run.infimm is None:
        return 0.0
    settings = run.infimm.cross_attention
    block = gated_block_flops(
        settings, run.decoder.hidden_size, run.infimm.resampler.width, tokens=1, latents=1, pairs=0
    )
    return run.decoder.num_layers / settings.every_n_layers * block.weights / 2


def _tower_parameters(run: RunConfig) -> float:
    """Of a tower that may learn; one that never does is small beside its decoder."""
    if run.aquila_vl is None:
        return 0.0
    return siglip_flops(run.aquila_vl.tower, 1).weights / 2 / run.aquila_vl.tower.tokens


class Corrected:
    """Guesses of many layouts, corrected by the judged ones that are most like each."""

    def __init__(self, guesses: Mapping[Choice, Guess]) -> None:
        self.guesses = guesses
        self.seen: list[tuple[Choice, float, float]] = []
        """(layout, times its guessed seconds, times its guessed activations)."""

    def learn(self, one: Evaluation, guessed: Guess | None = None) -> None:
        """From a layout that was judged."""
        known = guessed or self.guesses[one.choice]
        left = max(one.needed / (1 + SLACK) - known.static, 0.0)
        self.seen.append(
            (one.choice, one.seconds / known.seconds, max(left / known.activations, 0.01) if known.activations else 1.0)
        )

    def with_seen_of(self, other: Corrected) -> Corrected:
        """The same guesses, corrected by what was judged elsewhere."""
        found = Corrected(self.guesses)
        found.seen = other.seen
        return found

    def estimate(self, choice: Choice) -> Estimate:
        """The guess, times what the judged ones say."""
        known = self.guesses[choice]
        weights = [_likeness(choice, seen) for seen, _, _ in self.seen]
        time = _mean(weights, [time for _, time, _ in self.seen])
        memory = _mean(weights, [memory for _, _, memory in self.seen])
        return Estimate(choice, time * known.seconds, (known.static + memory * known.activations) * (1 + SLACK))


def _likeness(one: Choice, other: Choice) -> float:
    return math.prod(share for name, share in _ALIKE.items() if getattr(one, name) != getattr(other, name))


def _mean(weights: Sequence[float], ratios: Sequence[float]) -> float:
    """Of ratios, so that twice and half cancel out; 1 where there are none."""
    if not weights:
        return 1.0
    logs = sum(weight * math.log(ratio) for weight, ratio in zip(weights, ratios, strict=True))
    return math.exp(logs / sum(weights))
