"""The pipeline simulated: when each stage computes and when it waits, for all data-parallel replicas at once.

What a stage does, and in which order, never depends on time. So each moment is a maximum over moments before it plus
a duration, and one walk through the programs times all replicas, each with its own images, as arrays.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megavlm.plan.pipeline_program import Message, Mode, Post, Run, Shape, Step, Wait, program

Floats = NDArray[np.float64]


class Timed(NamedTuple):
    """A pass of the timeline, in seconds from the start of the step."""

    stage: int
    run: Run
    start: float
    end: float


@dataclass(frozen=True)
class Work:
    """How long things take, in seconds; chunk c of stage s is number c * stages + s."""

    forward: Floats
    """[chunks, microbatches, replicas]; lengths of 1 stand for all the same."""
    backward: Floats
    """The same; with what is recomputed, and without what frozen parts need not do."""
    transfer: Floats
    """[stages]: of a message from each stage to the next, and from the last to the first; backward alike."""
    handshake: float = 0.0
    """Of the shape that goes ahead of it."""

    @property
    def replicas(self) -> int:
        return max(self.forward.shape[2], self.backward.shape[2])

    def of_replica(self, replica: int) -> Work:
        forward, backward = (times[:, :, replica % times.shape[2], None] for times in (self.forward, self.backward))
        return replace(self, forward=forward, backward=backward)


@dataclass(frozen=True)
class Pipeline:
    """What became of a step."""

    shape: Shape
    busy: Floats
    """[stages, replicas]: seconds of computing."""
    finished: Floats
    """[stages, replicas]: seconds until a stage has done all its passes."""
    slowest: int
    """The replica that all others wait for."""
    timeline: tuple[Timed, ...]
    """Of that replica."""

    @property
    def seconds(self) -> float:
        """Until the last stage of the slowest replica is through."""
        return float(self.finished.max())

    @property
    def bubble(self) -> float:
        """Seconds beyond the work of the slowest replica's busiest stage, over that work."""
        busiest = float(self.busy[:, self.slowest].max())
        return self.seconds / busiest - 1 if busiest else 0.0

    @property
    def idle_share(self) -> float:
        """Share of its stages' time in which the slowest replica does not compute."""
        return 1 - float(self.busy[:, self.slowest].mean()) / self.seconds if self.seconds else 0.0

    @property
    def imbalance(self) -> float:
        """Share of the step that a mean replica waits for the slowest one."""
        return 1 - float(self.finished.max(axis=0).mean()) / self.seconds if self.seconds else 0.0


def work_of(
    shape: Shape, forward: ArrayLike, backward: ArrayLike, transfer: ArrayLike = 0.0, handshake: float = 0.0
) -> Work:
    """From seconds that hold for all, by [chunk], by [chunk, microbatch], or by [chunk, microbatch, replica]."""
    transfers = np.broadcast_to(np.asarray(transfer, dtype=float), (shape.stages,))
    return Work(_for_all(shape, forward), _for_all(shape, backward), transfers, handshake)


def _for_all(shape: Shape, given: ArrayLike) -> Floats:
    times: Floats = np.asarray(given, dtype=float)
    times = times[(..., *(None,) * (3 - times.ndim))]
    return np.broadcast_to(times, (shape.all_chunks, shape.microbatches, times.shape[2]))


def simulate(shape: Shape, work: Work, mode: Mode = "variable") -> Pipeline:
    """A step of all replicas."""
    programs = _programs(shape, mode)
    finished, busy = _walk(shape, programs, work)
    slowest = int(finished.max(axis=0).argmax())
    timeline: list[Timed] = []
    _walk(shape, programs, work.of_replica(slowest), timeline)
    return Pipeline(shape, busy, finished, slowest, tuple(timeline))


@functools.lru_cache(maxsize=8)
def _programs(shape: Shape, mode: Mode) -> list[list[Step]]:
    return [program(shape, stage, mode) for stage in range(shape.stages)]


def _walk(
    shape: Shape, programs: list[list[Step]], work: Work, timeline: list[Timed] | None = None
) -> tuple[Floats, Floats]:
    """(finished, busy), each [stages, replicas]."""
    replicas = work.replicas
    post = _PostOffice(shape, programs, work)
    clock: list[Any] = [0.0 if replicas == 1 else np.zeros(replicas) for _ in programs]
    busy: list[Any] = [0.0 if replicas == 1 else np.zeros(replicas) for _ in programs]
    durations = {"forward": _by_run(work.forward, replicas), "backward": _by_run(work.backward, replicas)}
    places, ready = [0] * shape.stages, list(range(shape.stages))
    while ready:
        stage = ready.pop()
        steps, now = programs[stage], clock[stage]
        for place in range(places[stage], len(steps)):
            step = steps[place]
            if isinstance(step, Run):
                seconds = durations[step.way][step.chunk][step.microbatch]
                if timeline is not None:
                    timeline.append(Timed(stage, step, now, now + seconds))
                now, busy[stage] = now + seconds, busy[stage] + seconds
            elif isinstance(step, Post):
                ready += post.offer(step, now)
            elif post.holds_up(step, stage):
                break
            else:
                now = post.waited(step, now)
        else:
            place = len(steps)
        places[stage], clock[stage] = place, now
    stuck = [stage for stage, place in enumerate(places) if place < len(programs[stage])]
    assert not stuck, f"stages {stuck} of {shape} wait for each other"
    return np.array(clock).reshape(shape.stages, -1), np.array(busy).reshape(shape.stages, -1)


def _by_run(times: Floats, replicas: int) -> Any:
    """[chunk][microbatch] -> a number, or an array over replicas where there are several."""
    return times[:, :, 0].tolist() if replicas == 1 else times


class _PostOffice:
    """Messages under way: when each has been asked for, and when it passes."""

    def __init__(self, shape: Shape, programs: list[list[Step]], work: Work) -> None:
        self.shape = shape
        self.transfer: list[float] = work.transfer.tolist()
        self.handshake = work.handshake
        self.latest: Callable[[Any, Any], Any] = max if work.replicas == 1 else np.maximum
        self.asked: dict[Message, Any] = {}
        self.passes: dict[Message, Any] = {}
        self.waiting: dict[Message, int] = {}
        # Moments of all replicas are kept only as long as a stage has yet to wait for them.
        self.waits = Counter(m for steps in programs for step in steps if isinstance(step, Wait) for m in step.messages)

    def offer(self, step: Post, now: Any) -> list[int]:
        """Note one end of each message; the stages that can go on because a message now passes."""
        woken = []
        for message in (*step.sends, *step.receives):
            if message not in self.asked:
                self.asked[message] = now
                continue
            self.passes[message] = self.latest(self.asked.pop(message), now) + self._seconds(message)
            if message in self.waiting:
                woken.append(self.waiting.pop(message))
        return woken

    def _seconds(self, message: Message) -> float:
        if message.is_shape:
            return self.handshake
        way_from = message.chunk if message.way == "forward" else message.chunk - 1
        # Of one chunk a stage, shape and tensor follow each other anyway.
        return self.transfer[way_from % self.shape.stages] + (self.handshake if self.shape.chunks == 1 else 0.0)

    def holds_up(self, step: Wait, stage: int) -> bool:
        """Whether a message that is waited for does not pass yet; the stage is woken when it does."""
        for message in step.messages:
            if message not in self.passes:
                self.waiting[message] = stage
                return True
        return False

    def waited(self, step: Wait, now: Any) -> Any:
        """The moment when all of them have passed."""
        for message in step.messages:
            now = self.latest(now, self.passes[message])
            self.waits[message] -= 1
            if not self.waits[message]:
                del self.passes[message]
        return now
