"""A step before anything is read: its samples, what each costs, the rows they are packed into, who reads which row.

All of it follows from the order and the indexes, and is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megavlm.config import Config, option, require
from megavlm.data.chat import ChatConfig
from megavlm.data.formats import SampleFormat
from megavlm.data.index import Index, Pictures, TokenCounts
from megavlm.data.order import StepOrder, StepSamples, StreamConfig
from megavlm.data.packing import PackLimits, StepPacking, apply_limit, deal_rows, pack_step
from megavlm.data.read import ShardReader
from megavlm.tiles import Ints


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What a run reads, and how it becomes rows."""

    path: str = option("data", name="--data-path")
    """The folder that holds a prepared data set under each source's name."""
    valid_path: str | None = option(None, name="--valid-data-path")
    """Held-out data, prepared: below it those of a source stand under the source's name. `--eval-interval` says when
    the loss on them is computed; sources without any are left out."""
    streams: tuple[StreamConfig, ...]
    """What each step takes of which data sets."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """How conversations become tokens."""
    tokenizer: str | None = None
    """Folder of the tokenizer; none: that of the weights that the run starts from."""
    rows: PackLimits
    """How samples are packed into rows."""
    decoder: Literal["auto", "dali", "pil", "exact"] = option("auto", name="--image-decoder")
    """What decodes pictures: NVIDIA DALI, PIL with torch's resize, PIL alone (exact), or DALI where it is installed."""
    threads: int = option(4, name="--num-workers")
    """Threads that read and decode for the steps to come; 0 does it in the main thread, when it is needed."""
    ahead: int = option(2, name="--prefetch-steps")
    """Steps that are made ready while others are trained on."""
    most_damaged: float = option(0.01, name="--max-damaged-fraction")
    """Of all samples so far, those that could not be read: above it the run stops."""
    full_ledger: bool = False
    """Write every sample's name into the ledger. Otherwise damaged ones are named, those cut or left out counted."""

    def check(self) -> None:
        require(len(self.streams) > 0, self, "streams", "is empty", "name at least one stream")
        require(self.threads >= 0, self, "threads", "is negative", "use 0 or more")
        require(self.ahead >= 0, self, "ahead", "is negative", "use 0 or more")
        require(0 <= self.most_damaged <= 1, self, "most_damaged", "is no fraction", "use for example 0.01")

    @property
    def samples_per_step(self) -> int:
        """The global batch, in samples."""
        return sum(stream.samples_per_step for stream in self.streams)


@dataclass(frozen=True)
class Source:
    """A prepared data set, opened."""

    name: str
    index: Index
    reader: ShardReader
    counts: TokenCounts


def open_sources(config: DataConfig, words: SampleFormat) -> list[Source]:
    """The sources of all streams, in the order of their numbers."""
    found = []
    for stream in config.streams:
        for source in stream.sources:
            folder = Path(config.path) / source.name
            index = Index.open(folder)
            counts = index.token_counts(words.name, words.hash, words.options)
            found.append(Source(source.name, index, ShardReader(folder, index), counts))
    return found


@dataclass(frozen=True)
class StepPlan:
    """A step: one entry for each of its samples in all that is not said to be otherwise."""

    samples: StepSamples
    tokens: Ints
    """At full length, cut or dropped (0) as the recipe says."""
    tiles: Ints
    is_cut: NDArray[np.bool_]
    is_dropped: NDArray[np.bool_]
    pictures: Mapping[int, tuple[Ints, Pictures]]
    """Source -> (its samples' places in the step, the sizes of their pictures)."""
    packing: StepPacking

    def pictures_of(self, sample: int) -> tuple[Pictures, int]:
        """The table that has a sample's pictures, and the sample's number in it."""
        places, pictures = self.pictures[int(self.samples.source[sample])]
        return pictures, int(np.searchsorted(places, sample))


class Planner:
    """Makes the plan of any step."""

    def __init__(self, config: DataConfig, sources: Sequence[Source], words: SampleFormat, seed: int) -> None:
        self.config, self.sources, self.words = config, sources, words
        self.order = StepOrder(config.streams, {source.name: len(source.index) for source in sources}, seed)

    def plan(self, step: int) -> StepPlan:
        """The plan of a step, from 0."""
        samples = self.order.step(step)
        tokens, tiles, to_cut = (np.zeros_like(samples.index) for _ in range(3))
        unreadable, tables = np.zeros(len(samples.index), np.bool_), {}
        for number in np.unique(samples.source).tolist():
            places = np.flatnonzero(samples.source == number)
            index, counts = samples.index[places], self.sources[number].counts
            pictures = self.sources[number].index.pictures(index)
            cost = self.words.costs(pictures)
            unreadable[places] = counts.tokens[index] == 0
            tokens[places], tiles[places] = counts.tokens[index] + cost.tokens, cost.tiles
            to_cut[places] = tokens[places] - cost.uncut
            tables[number] = places, pictures
        limited = [np.where(unreadable, 0, tokens), np.zeros_like(unreadable), unreadable.copy()]
        for number, stream in enumerate(self.config.streams):
            chosen = (samples.stream == number) & ~unreadable
            limit = stream.tokens_per_sample or self.config.rows.max_tokens
            held = apply_limit(tokens[chosen], to_cut[chosen], limit, stream.over_long)
            for column, value in zip(limited, held, strict=True):
                column[chosen] = value
        kept, is_cut, is_dropped = limited
        tiles = np.where(is_dropped, 0, tiles)
        packing = pack_step(kept, tiles, self.config.rows, packing_costs(kept, tiles))
        return StepPlan(samples, kept, tiles, is_cut, is_dropped, tables, packing)

    def rows_dealt(self, plan: StepPlan, rank: int, ranks: int) -> Ints:
        """The rows that a data-parallel rank reads."""
        return deal_rows(plan.packing, ranks)[rank]

    def samples_of(self, plan: StepPlan, row: int) -> Ints:
        """The samples of a row in their order, those that are dropped left out."""
        samples = plan.packing.samples(row)
        return samples[~plan.is_dropped[samples]]


def packing_costs(tokens: Ints, tiles: Ints) -> NDArray[np.float64]:
    """By which rows are evened out: the decoder's work, attention's square included, and the tower's."""
    # In Qwen2.5-1.5B causal attention costs as much as all weights do at 36,000 tokens: 1.54e9 / (28 layers x 1536).
    decoder = tokens * (1 + tokens / 36_000)
    return np.stack([decoder, tiles.astype(np.float64)])
