"""The steps of a run as batches: plan, read, decode, pack. Which rank reads what is a formula; nothing is exchanged.

Every rank of a model-parallel group reads the words of its group's rows, and the picture files of those pictures alone
that it encodes. A sample that cannot be read keeps its place and shape, as blanks in which nothing is trained; the rank
that saw it says so (`damaged`), and the caller tells the others before the step is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megavlm.batch import TextBatch
from megavlm.data.decode import Decoder, EncodedPicture
from megavlm.data.formats import Document, PlannedPicture, SampleFormat
from megavlm.data.sample import Sample
from megavlm.data.step_plan import DataConfig, Planner, Source, StepPlan
from megavlm.errors import DataError, TooLongError
from megavlm.tiles import Ints

T = TypeVar("T")

OwnPictures = Callable[[Sequence[Sequence[int]]], list[tuple[int, ...]]]
"""(tiles of each picture of each row) -> the pictures of each row that this rank encodes."""


@dataclass(frozen=True)
class SampleName:
    """A sample of a step, as reports and ledgers name it."""

    place: int
    """In the step."""
    source: str
    index: int
    """In its source."""
    stream: int


@dataclass(frozen=True)
class Damage:
    """A sample that could not be read, or not whole, or not cut to its length."""

    row: int
    """Which of this rank's rows holds it."""
    document: int
    """Which of the row's documents it is."""
    sample: SampleName
    problem: str
    is_too_long: bool = False
    """Nothing is wrong with it, but that it is longer than the run allows and ends with an image."""


@dataclass(frozen=True)
class StepBatches:
    """What one data-parallel rank computes in a step: a microbatch a row."""

    step: int
    batches: list[TextBatch]
    samples: list[list[SampleName]]
    """Of each row, the documents in order."""
    damaged: list[Damage]
    """What this rank found."""
    plan: StepPlan


class _Here(Executor):
    """Does the work on the spot: what is looked for in a debugger should not hide in a thread."""

    def submit(self, function: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(function(*arguments, **named))
        return done


def _readers(threads: int) -> Executor:
    return ThreadPoolExecutor(threads, thread_name_prefix="read") if threads else _Here()


class Loader:
    """Makes the batches of any step, and steps ahead while others are computed."""

    def __init__(
        self,
        config: DataConfig,
        words: SampleFormat,
        sources: Sequence[Source],
        decoder: Decoder,
        own_pictures: OwnPictures,
        *,
        seed: int,
        data_rank: int,
        data_size: int,
        empty: Tensor,
    ) -> None:
        """`empty`: the patch rows of no picture, [0, values]."""
        self.config, self.words, self.sources, self.decoder = config, words, sources, decoder
        self.own_pictures, self.data_rank, self.data_size, self.empty = own_pictures, data_rank, data_size, empty
        self.planner = Planner(config, sources, words, seed)
        self._threads = _readers(config.threads)

    def steps(self, first: int, last: int) -> Iterator[StepBatches]:
        """Steps first ... last - 1, some of them made ready ahead."""
        if self.config.threads == 0:
            yield from map(self.step, range(first, last))
            return
        with ThreadPoolExecutor(1, thread_name_prefix="steps") as one:
            waiting: list[Future[StepBatches]] = []
            for step in range(first, min(first + self.config.ahead, last)):
                waiting.append(one.submit(self.step, step))
            for step in range(first, last):
                if step + self.config.ahead < last:
                    waiting.append(one.submit(self.step, step + self.config.ahead))
                yield waiting.pop(0).result()

    def step(self, step: int) -> StepBatches:
        """The batches of one step."""
        plan = self.planner.plan(step)
        dealt = self.planner.rows_dealt(plan, self.data_rank, self.data_size)
        rows = [self.planner.samples_of(plan, int(row)) for row in dealt]
        words = [[self._threads.submit(self._document, plan, int(sample)) for sample in row] for row in rows]
        documents = [[future.result() for future in row] for row in words]
        own = self.own_pictures([[p.tiles for document, _ in row for p in document.pictures] for row in documents])
        damaged = [
            Damage(row, number, self._name(plan, int(rows[row][number])), str(error), isinstance(error, TooLongError))
            for row, found in enumerate(documents)
            for number, (_, error) in enumerate(found)
            if error is not None
        ]
        patches, of_pictures = self._pictures(plan, rows, documents, own)
        lengths = plan.packing.row_lengths[dealt].tolist()
        batches = [
            self.words.batch([document for document, _ in found], length, patches[row], own[row])
            for row, (found, length) in enumerate(zip(documents, lengths, strict=True))
        ]
        names = [[self._name(plan, int(sample)) for sample in row] for row in rows]
        return StepBatches(step, batches, names, damaged + of_pictures, plan)

    def _document(self, plan: StepPlan, sample: int) -> tuple[Document, DataError | None]:
        """A sample of the plan, and what is wrong with it."""
        pictures, number = plan.pictures_of(sample)
        planned, tokens = self.words.plan(pictures, number), int(plan.tokens[sample])
        try:
            found = self.words.document(self._read(plan, sample), pictures, number, tokens)
            if len(found.tokens) != tokens:
                problem = f"its tokens are {len(found.tokens)}, and the index says {tokens}"
                raise DataError(f"sample {sample}", tokens, problem, "index the data again")
        except DataError as error:
            return self.words.blank(planned, tokens), error
        return found, None

    def _read(self, plan: StepPlan, sample: int) -> Sample:
        source = self.sources[int(plan.samples.source[sample])]
        return source.reader.read_text(int(plan.samples.index[sample]))

    def _pictures(
        self,
        plan: StepPlan,
        rows: Sequence[Ints],
        documents: Sequence[Sequence[tuple[Document, DataError | None]]],
        own: Sequence[tuple[int, ...]],
    ) -> tuple[list[Tensor], list[Damage]]:
        """The patch rows of each row's own pictures, and what was wrong with their samples."""
        wanted = [
            (row, document, picture)
            for row, pictures in enumerate(own)
            for document, picture in _at(pictures, [found.pictures for found, _ in documents[row]])
        ]
        reads = [
            self._threads.submit(partial(self._files, plan, int(rows[row][document]), picture))
            for row, document, picture in wanted
        ]
        found = [read.result() for read in reads]
        decoded = self.decoder.decode_rows(
            [
                EncodedPicture(tuple(files), picture.plan, "picture")
                for (files, _), (_, _, picture) in zip(found, wanted, strict=True)
            ]
        )
        of_pictures = decoded.patches.split([picture.plan.patch_rows for _, _, picture in wanted])
        of_rows: list[list[Tensor]] = [[self.empty] for _ in rows]
        damaged = []
        for (row, document, _), patches, problem, (_, unread) in zip(
            wanted, of_pictures, decoded.problems, found, strict=True
        ):
            of_rows[row].append(patches)
            if unread or problem:
                name = self._name(plan, int(rows[row][document]))
                damaged.append(Damage(row, document, name, unread or str(problem)))
        return [torch.cat(patches) for patches in of_rows], damaged

    def _files(self, plan: StepPlan, sample: int, picture: PlannedPicture) -> tuple[list[bytes], str]:
        """A picture's files, and what is wrong with them; empty files then."""
        source = self.sources[int(plan.samples.source[sample])]
        try:
            return source.reader.read_pictures(int(plan.samples.index[sample]), picture.files), ""
        except DataError as error:
            return [b""] * len(picture.files), str(error)

    def _name(self, plan: StepPlan, sample: int) -> SampleName:
        samples = plan.samples
        source = self.sources[int(samples.source[sample])].name
        return SampleName(sample, source, int(samples.index[sample]), int(samples.stream[sample]))


def _at(numbers: Sequence[int], pictures: Sequence[Sequence[PlannedPicture]]) -> Iterator[tuple[int, PlannedPicture]]:
    """(document, picture) of pictures counted through all documents."""
    ends = np.cumsum([0, *map(len, pictures)])
    for number in numbers:
        document = int(np.searchsorted(ends, number, side="right")) - 1
        yield document, pictures[document][number - int(ends[document])]
