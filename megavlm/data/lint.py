"""Every sample through the whole path, as in training but without it: read, checksums, decode, resize, tokens, labels.

Of the pixels only the last step is left out, from tiles to patch rows, which no file can stop. What is found to be
wrong is told in the order of the samples, whatever thread found it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from megavlm.batch import IGNORED
from megavlm.config import require
from megavlm.data.decode import DEFAULT_DECODE, EncodedPicture, decode_problems
from megavlm.data.formats import Document, SampleFormat
from megavlm.data.index import Index, Pictures, TokenCounts
from megavlm.data.look import LookConfig
from megavlm.data.progress import Progress
from megavlm.data.read import ShardReader
from megavlm.data.sample import Sample
from megavlm.data.splice import MOST_TOKENS
from megavlm.errors import DataError, MegavlmError

AHEAD = 4
"""Samples of each thread that are under way."""


@dataclass(frozen=True, kw_only=True)
class LintConfig(LookConfig):
    """How a data set is checked."""

    max_tokens: int | None = None
    """Samples of more tokens than this, pictures included, are named too; none: any length will do."""
    threads: int | None = None
    """Threads that read and decode; by default one for each core."""
    json: bool = False
    """A JSON object in each line."""

    def check(self) -> None:
        super().check()
        require(self.threads is None or self.threads >= 1, self, "threads", "is below 1", "use 1 or more")
        require(self.max_tokens is None or self.max_tokens >= 1, self, "max_tokens", "is below 1", "use 1 or more")


class Bad(NamedTuple):
    """A sample or shard that something is wrong with."""

    sample: int | None
    """Its number; None for a shard."""
    id: str | None
    """Its id, where its words can be read."""
    shard: str
    problem: str

    def __str__(self) -> str:
        if self.sample is None:
            return f"shard {self.shard}: {self.problem}"
        name = "" if self.id is None else f" ({_one_line(self.id)})"
        return f"sample {self.sample}{name} in {self.shard}: {_one_line(self.problem)}"


@dataclass
class LintReport:
    """What was looked at."""

    samples: int
    bad: int = 0
    """Samples and shards."""
    tokens: int = 0
    """Of all good samples, pictures included."""
    targets: int = 0
    tiles: int = 0
    note: str = ""
    """What could not be checked."""

    def __str__(self) -> str:
        said = f"{self.samples:,} samples, {f'{self.bad:,} bad' if self.bad else 'all good'}"
        counts = f"{self.tokens:,} tokens, {self.targets:,} trained, {self.tiles:,} tiles"
        return f"{said}: {counts}" + (f"\n{self.note}" if self.note else "")


class _Seen(NamedTuple):
    """One sample that was looked at."""

    bad: Bad | None
    tokens: int = 0
    targets: int = 0
    tiles: int = 0


def lint(folder: str, config: LintConfig, on_bad: Callable[[Bad], None]) -> LintReport:
    """Check a data set; errors that are not of a sample are raised, such as of the index or the tokenizer."""
    index, words = Index.open(folder), config.format
    index.verify()
    report = LintReport(len(index))
    threads = config.threads or len(os.sched_getaffinity(0))
    linter = _Linter(folder, index, words, config)
    if linter.counts is None:
        command = f"megavlm data index {folder} {words.options}"
        report.note = f"there are no token counts of this tokenizer and template to check: `{command}` makes them"
    for shard, problem in index.report.damaged.items():
        report.bad += 1
        on_bad(Bad(None, None, shard, problem))
    progress = Progress("checking", len(index), "samples")
    for done, seen in enumerate(_in_order(linter.look, range(len(index)), threads), 1):
        report.tokens += seen.tokens
        report.targets += seen.targets
        report.tiles += seen.tiles
        if seen.bad is not None:
            report.bad += 1
            progress.clear()
            on_bad(seen.bad)
        progress.update(done)
    progress.clear()
    return report


def _in_order(look: Callable[[int], _Seen], samples: Iterable[int], threads: int) -> Iterator[_Seen]:
    """What threads make of the samples, in their order, few of them under way."""
    with ThreadPoolExecutor(threads, thread_name_prefix="lint") as pool:
        numbers = iter(samples)
        waiting: deque[Future[_Seen]] = deque(pool.submit(look, number) for number in islice(numbers, AHEAD * threads))
        try:
            while waiting:
                seen = waiting.popleft().result()
                waiting.extend(pool.submit(look, number) for number in islice(numbers, 1))
                yield seen
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Linter:
    """Looks at one sample at a time; many threads may."""

    def __init__(self, folder: str, index: Index, words: SampleFormat, config: LintConfig) -> None:
        self.index, self.words, self.rule, self.most = index, words, config.rule, config.max_tokens
        self.reader = ShardReader(folder, index)
        self.counts: TokenCounts | None = None
        if words.name in index.token_sets():
            self.counts = index.token_counts(words.name, words.hash, words.options)

    def look(self, number: int) -> _Seen:
        """What one sample is like."""
        sample: Sample | None = None
        try:
            sample = self.reader.read(number)
            seen = self._seen(number, sample)
        except DataError as error:
            seen = _said(error, number)
        except MegavlmError:
            raise  # of the tokenizer or the settings, not of this sample
        except Exception as error:  # it would stop a run, which is what a lint is there to find
            seen = f"fails: {type(error).__name__}: {error}"
        if isinstance(seen, str):
            shard = self.index.shard_names[int(self.index.shards_of([number])[0])]
            return _Seen(Bad(number, self._id(number) if sample is None else sample.id, shard, seen))
        return seen

    def _id(self, number: int) -> str | None:
        """The id of a sample of which the pictures, or the words, cannot be read."""
        try:
            return self.reader.read_text(number).id
        except DataError:
            return None

    def _seen(self, number: int, sample: Sample) -> _Seen | str:
        """The figures of a sample, or what is wrong with it."""
        pictures = self.index.pictures([number])
        document = self.words.document(sample, pictures, 0, MOST_TOKENS)
        tokens, targets = len(document.tokens), int((document.targets[1:] != IGNORED).sum())
        problem = self._of_pictures(sample, document) or self._of_counts(number, pictures, tokens, targets)
        if problem:
            return problem
        if targets == 0:
            return "nothing of it is trained"
        if self.most is not None and tokens > self.most:
            return f"its {tokens} tokens are more than {self.most}"
        return _Seen(None, tokens, targets, sum(picture.tiles for picture in document.pictures))

    def _of_pictures(self, sample: Sample, document: Document) -> str:
        files = [file for picture in sample.pictures for file in picture.files]
        encoded = [
            EncodedPicture(tuple(files[place] for place in one.files), one.plan, f"picture {number}")
            for number, one in enumerate(document.pictures)
        ]
        problems = decode_problems(encoded, self.rule, DEFAULT_DECODE.limits)
        return next((str(problem) for problem in problems if problem), "")

    def _of_counts(self, number: int, pictures: Pictures, tokens: int, targets: int) -> str:
        if self.counts is None:
            return ""
        known = int(self.counts.tokens[number]) + int(self.words.costs(pictures).tokens[0])
        trained = int(self.counts.targets[number])
        if (tokens, targets) == (known, trained):
            return ""
        return f"it has {tokens} tokens, {targets} of them trained, and the index says {known} and {trained}"


def _said(error: DataError, number: int) -> str:
    """What is wrong with a sample, without its name and without the remedy."""
    if error.where == f"sample {number}":
        return error.problem
    said = str(error).removesuffix(f"; {error.remedy}")
    return said.partition(": ")[2] if said.startswith("sample ") else said


def _one_line(text: str) -> str:
    """What a terminal shows and does not obey, in one line."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
