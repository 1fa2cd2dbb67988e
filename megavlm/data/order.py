"""Which samples make a step: a pure function of the recipe, the seed and the step, at the same cost for every step.

Three closed forms, one upon the other:

1. `Blend`: place j of a stream is turn t of source s.
2. Turn t of a source that has m samples is place t mod m of its pass t div m.
3. `KeyedPermutation`: each pass over a source is shuffled by the key (seed, source, part, pass).

A source's samples are first put in an order of their own, keyed by the source's name and not by the seed. A limit takes
the first of them, parts are even cuts of what it takes: so parts are disjoint and random whatever the seeds of the
stages that train on them.

Step s takes samples [s * n, (s + 1) * n) of each stream, n being the stream's samples a step. The global batch is the
sum over the streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np

from megavlm.config import Config, require
from megavlm.data.blend import FINEST, Blend, whole_parts
from megavlm.data.permutation import KeyedPermutation
from megavlm.errors import ConfigError, DataError
from megavlm.tiles import Ints

OverLong = Literal["refuse", "cut", "drop"]
"""What becomes of a sample above the limit: an error; its last text left out; the whole left out."""
AMOUNTS = ("weight", "samples", "epochs")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """A prepared data set's place in a stream; how much of it is said in one of three ways, the same in all sources."""

    name: str
    """The data set, and the key of its shuffles."""
    weight: float | None = None
    """Its share of an endless stream, beside the weights of the other sources."""
    samples: int | None = None
    """Samples that it gives in all, pass after pass."""
    epochs: float | None = None
    """Passes over it in all; of a last broken pass, the samples that stand first."""
    part: int = 0
    """Which of its parts is used, from 0."""
    parts: int = 1
    """Random disjoint parts that it is cut into, of sizes that differ by one at most."""
    limit: int | None = None
    """Samples of it that are used at all, drawn at random, before it is cut into parts; none: all."""

    def check(self) -> None:
        require(self.name != "", self, "name", "is empty", "name a data set")
        for field in (*AMOUNTS, "limit"):
            value = getattr(self, field)
            require(value is None or value > 0, self, field, "is not above 0", "use a positive number, or leave it out")
        require(self.parts >= 1, self, "parts", "is below 1", "use 1 for the whole source")
        remedy = f"use 0 to {self.parts - 1}"
        require(0 <= self.part < self.parts, self, "part", f"is not among {self.parts} parts", remedy)
        require(len(self.amounts) <= 1, self, "name", f"has {' and '.join(self.amounts)}", "say one of them")

    @property
    def amounts(self) -> list[str]:
        """The ways in which its amount is said."""
        return [field for field in AMOUNTS if getattr(self, field) is not None]


@dataclass(frozen=True, kw_only=True)
class StreamConfig(Config):
    """Samples of one kind, blended from sources."""

    name: str = "data"
    """What logs call it."""
    samples_per_step: int
    """Its samples in each global batch."""
    loss_weight: float = 1.0
    """What the mean loss over its target tokens counts in the loss."""
    tokens_per_sample: int | None = None
    """The longest that a sample may be; none: as long as a row."""
    over_long: OverLong = "refuse"
    """What becomes of longer ones: an error, their last text left out, the whole sample left out."""
    sources: tuple[SourceConfig, ...]
    """What it is blended from."""

    def check(self) -> None:
        require(self.samples_per_step >= 1, self, "samples_per_step", "is below 1", "use 1 or more")
        require(self.loss_weight >= 0, self, "loss_weight", "is negative", "use 0 or more")
        limit = self.tokens_per_sample
        require(limit is None or limit >= 2, self, "tokens_per_sample", "leaves nothing to predict", "use at least 2")
        names = [source.name for source in self.sources]
        require(len(names) > 0, self, "sources", "is empty", "name at least one data set")
        require(len(set(names)) == len(names), self, "sources", "names a data set twice", "name each once")
        said = [" and ".join(source.amounts) or "nothing" for source in self.sources]
        is_one = len(set(said)) == 1 and said[0] in AMOUNTS
        problem = f"says {', '.join(dict.fromkeys(said))} of its data sets"
        remedy = "give each a weight (an endless stream), or each its samples, or each its epochs"
        require(is_one, self, "sources", problem, remedy)

    @property
    def amount(self) -> str:
        """How the amounts of its sources are said."""
        return self.sources[0].amounts[0]


@dataclass(frozen=True)
class Samples:
    """Samples in the order of their stream."""

    source: Ints
    """Numbers of their sources."""
    index: Ints
    """Which samples of their source they are, as its index counts them."""
    epoch: Ints
    """How many passes over the source's part were complete before each."""


class SourceOrder:
    """The order in which one source gives its samples."""

    def __init__(self, config: SourceConfig, size: int, seed: int) -> None:
        used = min(size, size if config.limit is None else config.limit)
        self._first = config.part * used // config.parts
        self.size = (config.part + 1) * used // config.parts - self._first
        """Samples of a pass."""
        if self.size < 1:
            whole = f"{used} samples in {config.parts} parts"
            raise ConfigError(f"source {config.name}", whole, "leave a part empty", "use fewer parts, or more samples")
        self._config, self._seed = config, seed
        self._is_whole = used == size and config.parts == 1
        self._split = KeyedPermutation(size, "split", config.name)

    @property
    def turns(self) -> int | None:
        """Samples that it gives in all, where the config says so."""
        if self._config.epochs is None:
            return self._config.samples
        return int(Fraction(str(self._config.epochs)) * self.size + Fraction(1, 2))

    def at(self, turns: Ints) -> tuple[Ints, Ints]:
        """(index, epoch) of the samples that it gives at these turns."""
        epoch, place = np.divmod(turns, self.size)
        index = np.empty_like(place)
        for number in np.unique(epoch):
            is_here = epoch == number
            index[is_here] = self._shuffled(int(number))(place[is_here])
        return index if self._is_whole else self._split(self._first + index), epoch

    def _shuffled(self, epoch: int) -> KeyedPermutation:
        part = (self._config.part, self._config.parts)
        return KeyedPermutation(self.size, "pass", self._seed, self._config.name, *part, epoch)


class Stream:
    """All samples of one stream; `sizes` says how many each data set has."""

    def __init__(self, config: StreamConfig, sizes: Mapping[str, int], seed: int) -> None:
        for source in config.sources:
            if source.name not in sizes:
                known = ", ".join(sizes) or "none"
                problem, remedy = "is no prepared data set", f"prepare it, or use one that is: {known}"
                raise ConfigError(f"a source of stream {config.name}", source.name, problem, remedy)
        self.config = config
        self.sources = [SourceOrder(source, sizes[source.name], seed) for source in config.sources]
        self.blend = Blend(self._parts())

    def _parts(self) -> list[int]:
        where = f"stream {self.config.name}"
        if self.config.amount == "weight":
            weights = [source.weight for source in self.config.sources if source.weight is not None]
            parts = whole_parts(weights)
            if min(parts) == 0:
                lost = min(weights)
                raise ConfigError(where, lost, "is a weight too small beside the others", "use less unlike weights")
            return parts
        turns = [source.turns or 0 for source in self.sources]
        for source, count in zip(self.config.sources, turns, strict=True):
            if count == 0:
                problem = "are too few epochs for a single sample"
                raise ConfigError(f"source {source.name}", source.epochs, problem, "raise epochs, or leave it out")
        if sum(turns) > FINEST:
            raise ConfigError(where, sum(turns), "samples are more than a trillion", "use weights")
        return turns

    @property
    def length(self) -> int | None:
        """Its samples in all; none where it is endless."""
        return None if self.config.amount == "weight" else sum(self.blend.parts)

    def samples(self, first: int, count: int) -> Samples:
        """So many samples from the first one on; the sources numbered as the config lists them."""
        length = self.length
        assert first >= 0 and count >= 0 and (length is None or first + count <= length), (first, count, length)
        source, turn = self.blend.turns(np.arange(first, first + count))
        index, epoch = np.empty_like(turn), np.empty_like(turn)
        for number in np.unique(source):
            is_here = source == number
            index[is_here], epoch[is_here] = self.sources[number].at(turn[is_here])
        return Samples(source, index, epoch)


@dataclass(frozen=True)
class StepSamples:
    """The samples of a step: those of the first stream in its order, then those of the next."""

    stream: Ints
    """Numbers of their streams."""
    place: Ints
    """Where they stand in their stream."""
    source: Ints
    """Numbers of their sources, counted through all streams."""
    index: Ints
    """Which samples of their source they are."""
    epoch: Ints
    """How many passes over the source's part were complete before each."""


class StepOrder:
    """The samples of every step of a run."""

    def __init__(self, streams: Sequence[StreamConfig], sizes: Mapping[str, int], seed: int) -> None:
        self.sources = [source for stream in streams for source in stream.sources]
        """The sources by their numbers in `StepSamples`."""
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"source {name}", name, "is in two streams", "name each data set once")
        self.streams = [Stream(stream, sizes, seed) for stream in streams]

    @property
    def samples_per_step(self) -> int:
        """The global batch."""
        return sum(stream.config.samples_per_step for stream in self.streams)

    @cached_property
    def steps(self) -> int | None:
        """Steps until the first stream has ended, the last of which may be short; none where all are endless."""
        ends = [
            -(-stream.length // stream.config.samples_per_step) for stream in self.streams if stream.length is not None
        ]
        return min(ends, default=None)

    def step(self, step: int) -> StepSamples:
        """The samples of a step, from 0."""
        if step < 0 or (self.steps is not None and step >= self.steps):
            problem = f"is no step of the {self.steps} that the data have"
            raise DataError("step", step, problem, "train for fewer steps, or say more samples or epochs")
        found, first_source = [], 0
        for number, stream in enumerate(self.streams):
            wanted = stream.config.samples_per_step
            first = step * wanted
            count = wanted if stream.length is None else min(wanted, stream.length - first)
            samples = stream.samples(first, count)
            places = np.arange(first, first + count)
            source = samples.source + first_source
            found.append((np.full(count, number), places, source, samples.index, samples.epoch))
            first_source += len(stream.sources)
        return StepSamples(*(np.concatenate(columns) for columns in zip(*found, strict=True)))
