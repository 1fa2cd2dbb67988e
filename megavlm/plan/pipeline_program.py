"""What each pipeline stage does, in order: runs of its chunks, and the messages around them, as megatron-core has them.

1F1B sends and receives in blocking pairs. The interleaved schedule blocks while it fills and drains, and sends beside
the computation in between. A message passes when both its ends have asked for it, as NCCL's do.

Rows of varying length, which this trainer has, make megatron-core send the shape ahead of every tensor and wait for
all that the device has under way. So there a stage meets its neighbours at every message, also beside computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Way = Literal["forward", "backward"]
Mode = Literal["variable", "fixed", "hidden"]
"""Rows of varying length; of one length; and every message hidden that can be, as no schedule quite does."""


class Run(NamedTuple):
    """One chunk's forward or backward pass of one microbatch."""

    way: Way
    chunk: int
    """Of all stages: chunk c of stage s is c * stages + s."""
    microbatch: int


class Message(NamedTuple):
    """What such a pass hands on; named after the pass that made it."""

    way: Way
    chunk: int
    microbatch: int
    is_shape: bool = False


class Post(NamedTuple):
    """Offer messages to be sent, and ask for others, without waiting."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


class Wait(NamedTuple):
    """Go on when these messages have passed."""

    messages: tuple[Message, ...]


Step = Run | Post | Wait


class Shape(NamedTuple):
    """Of a pipeline."""

    stages: int
    chunks: int
    """Of each stage."""
    microbatches: int

    @property
    def all_chunks(self) -> int:
        return self.stages * self.chunks


def warmup(shape: Shape, stage: int) -> int:
    """Forward passes before the first backward one, but for the one right before it."""
    behind = shape.stages - stage - 1
    if shape.chunks == 1:
        return min(behind, shape.microbatches)
    return min(2 * behind + (shape.chunks - 1) * shape.stages, shape.chunks * shape.microbatches)


def in_flight(shape: Shape, stage: int) -> int:
    """Passes whose activations are held at once at most: microbatches, or chunk-microbatches where interleaved."""
    return min(warmup(shape, stage) + 1, shape.chunks * shape.microbatches)


def runs_of(shape: Shape, stage: int) -> list[Run]:
    """A stage's passes in their order, without the messages."""
    forward, backward = _ways(shape, stage)
    ahead = warmup(shape, stage)
    order = forward[:ahead]
    for done, run in enumerate(forward[ahead:]):
        order += [run, backward[done]]
    return order + backward[len(forward) - ahead :]


def _ways(shape: Shape, stage: int) -> tuple[list[Run], list[Run]]:
    """All forward passes of a stage and all backward ones, each in their order: groups of as many microbatches as there
    are stages go through one chunk after another."""
    stages, chunks, microbatches = shape
    forward, backward = [], []
    for first in range(0, microbatches, stages):
        group = range(first, min(first + stages, microbatches))
        for chunk in range(chunks):
            forward += [Run("forward", chunk * stages + stage, number) for number in group]
            backward += [Run("backward", (chunks - 1 - chunk) * stages + stage, number) for number in group]
    return forward, backward


def program(shape: Shape, stage: int, mode: Mode = "variable") -> list[Step]:
    """Everything a stage does."""
    if shape.stages == 1:
        return list(runs_of(shape, stage))
    if mode == "hidden":
        return list(_hidden(shape, stage))
    if shape.chunks == 1:
        return list(_one_forward_one_backward(shape, stage))
    return list(_Interleaved(shape, stage, mode == "variable").steps())


def needed(shape: Shape, run: Run) -> Message | None:
    """The message that a pass starts from."""
    if run.way == "forward":
        return Message("forward", run.chunk - 1, run.microbatch) if run.chunk else None
    last = run.chunk == shape.all_chunks - 1
    return None if last else Message("backward", run.chunk + 1, run.microbatch)


def made(shape: Shape, run: Run) -> Message | None:
    """The message that a pass hands on."""
    is_end = run.chunk == (shape.all_chunks - 1 if run.way == "forward" else 0)
    return None if is_end else Message(*run)


def _hidden(shape: Shape, stage: int) -> Iterator[Step]:
    runs = runs_of(shape, stage)
    yield Post((), tuple(message for run in runs if (message := needed(shape, run))))
    for run in runs:
        if message := needed(shape, run):
            yield Wait((message,))
        yield run
        if message := made(shape, run):
            yield Post((message,), ())


def _blocking(sends: Sequence[Message | None], receives: Sequence[Message | None]) -> Iterator[Step]:
    out, back = tuple(filter(None, sends)), tuple(filter(None, receives))
    if out or back:
        yield Post(out, back)
        yield Wait(out + back)


def _one_forward_one_backward(shape: Shape, stage: int) -> Iterator[Step]:
    forward, backward = _ways(shape, stage)
    ahead = warmup(shape, stage)
    for run in forward[:ahead]:
        yield from _blocking([], [needed(shape, run)])
        yield run
        yield from _blocking([made(shape, run)], [])
    steady = list(zip(forward[ahead:], backward, strict=False))
    if steady:
        yield from _blocking([], [needed(shape, steady[0][0])])
    for place, (one, other) in enumerate(steady):
        yield one
        yield from _blocking([made(shape, one)], [needed(shape, other)])
        yield other
        next_one = needed(shape, steady[place + 1][0]) if place + 1 < len(steady) else None
        yield from _blocking([made(shape, other)], [next_one])
    for run in backward[len(steady) :]:
        yield from _blocking([], [needed(shape, run)])
        yield run
        yield from _blocking([made(shape, run)], [])


class _Interleaved:
    """The interleaved schedule of one stage."""

    def __init__(self, shape: Shape, stage: int, sends_shapes: bool) -> None:
        self.shape, self.stage, self.sends_shapes = shape, stage, sends_shapes
        self.forward, self.backward = _ways(shape, stage)
        self.total, self.ahead = len(self.forward), warmup(shape, stage)
        # Messages asked for beside the computation, in their order, and the last one offered so, by way.
        self.asked: dict[Way, list[Message]] = {"forward": [], "backward": []}
        self.offered: dict[Way, Message | None] = {"forward": None, "backward": None}

    def steps(self) -> Iterator[Step]:
        yield from self._fill()
        for place in range(self.total - self.ahead):
            number = place + self.ahead
            is_last = number == self.total - 1
            yield from self._beside(self.forward[number], None if is_last else self._next("forward", number))
            yield from self._beside(self.backward[place], self._next("backward", place))
        yield from self._drain()

    def _fill(self) -> Iterator[Step]:
        yield from self._blocking(None, needed(self.shape, self.forward[0]))
        for number in range(self.ahead):
            run = self.forward[number]
            yield run
            coming = None if number == self.total - 1 else self._next("forward", number)
            yield from self._blocking(made(self.shape, run), coming)
        if self.ahead < self.total and (message := needed(self.shape, self.backward[0])):
            yield from self._post(None, message)

    def _beside(self, run: Run, coming: Message | None) -> Iterator[Step]:
        """A pass between messages that are under way while it computes."""
        if needed(self.shape, run) and self.asked[run.way]:
            yield Wait((self.asked[run.way].pop(0),))
        yield run
        before, going = self.offered[run.way], made(self.shape, run)
        yield from self._post(going, coming, run.way)
        if before:
            yield Wait((before,))
        self.offered[run.way] = going

    def _drain(self) -> Iterator[Step]:
        if self.ahead == self.total:
            yield from self._blocking(None, needed(self.shape, self.backward[0]))
        for number in range(self.total - self.ahead, self.total):
            run = self.backward[number]
            if number and needed(self.shape, run) and self.asked["backward"]:
                yield Wait((self.asked["backward"].pop(0),))
            yield run
            coming = None if number == self.total - 1 else self._next("backward", number)
            yield from self._blocking(made(self.shape, run), coming)
        if before := self.offered["backward"]:
            yield Wait((before,))

    def _post(self, going: Message | None, coming: Message | None, way: Way = "backward") -> Iterator[Step]:
        """Messages that pass while this stage goes on."""
        yield from self._shapes(going, coming)
        if going or coming:
            yield Post((going,) if going else (), (coming,) if coming else ())
        if coming:
            self.asked[way].append(coming)

    def _blocking(self, going: Message | None, coming: Message | None) -> Iterator[Step]:
        yield from self._shapes(going, coming)
        yield from _blocking([going], [coming])

    def _shapes(self, going: Message | None, coming: Message | None) -> Iterator[Step]:
        if not self.sends_shapes or not (going or coming):
            return
        sends, receives = ([one._replace(is_shape=True)] if one else [] for one in (going, coming))
        under_way = [*self.asked["forward"], *self.asked["backward"], *filter(None, self.offered.values())]
        yield Post(tuple(sends), tuple(receives))
        yield Wait((*sends, *receives, *under_way))

    def _next(self, way: Way, number: int) -> Message | None:
        """What is asked for beside a stage's pass of this number.

        The stage that leads (the first in forward, the last in backward) is ahead of the one it receives from by all
        stages but one; any other receives what its next pass starts from.
        """
        runs = self.forward if way == "forward" else self.backward
        leads = self.stage == (0 if way == "forward" else self.shape.stages - 1)
        if not leads:
            return needed(self.shape, runs[number + 1]) if number + 1 < self.total else None
        number -= self.shape.stages - 1
        if number < 0:
            return None
        away = self.shape.stages - 1 if way == "forward" else 1 - self.shape.stages
        run = runs[number]
        return made(self.shape, run._replace(chunk=run.chunk + away))
