"""The pipeline simulator: megatron-core's own order and messages, closed formulas, and a slow, plain reference."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavlm.plan.pipeline import Floats, Work, simulate, work_of
from megavlm.plan.pipeline_program import (
    Message,
    Mode,
    Post,
    Run,
    Shape,
    Step,
    Wait,
    in_flight,
    needed,
    program,
    runs_of,
)
from megavlm.platform import machine

MODES: list[Mode] = ["variable", "fixed", "hidden"]
ONE_CHUNK = [Shape(p, 1, m) for p in (2, 3, 4, 8) for m in (1, 2, 3, 8, 13)]
INTERLEAVED = [Shape(p, v, p * k) for p in (2, 3, 4) for v in (2, 3, 5) for k in (1, 2, 5)]


class Recorder(P2PCommunicator):
    """Takes the place of the messages of one stage, and writes down what megatron-core asks of them."""

    def __init__(self, shape: Shape, stage: int, config: TransformerConfig) -> None:
        self.pp_group: Any = SimpleNamespace(size=lambda: shape.stages, rank=lambda: stage)
        self.config = config
        self.virtual_pipeline_model_parallel_size = shape.chunks if shape.chunks > 1 else None
        self.log: list[Any] = []

    def _communicate(self, **asked: Any) -> Any:
        sends = (asked["tensor_send_next"] is not None) + (asked["tensor_send_prev"] is not None)
        receives = asked["recv_prev"] + asked["recv_next"]
        waits = asked.get("wait_on_reqs", True)
        number = len(self.log)
        if sends or receives:
            self.log.append(("exchange" if waits else "post", sends, receives))
        handles = {}
        for name in ("send_next", "send_prev", "recv_prev", "recv_next"):
            given = asked.get(f"tensor_{name}") is not None if name.startswith("send") else asked[name]
            if given and not waits:
                record = ("wait", number, name[:4])
                handles[name] = SimpleNamespace(wait=lambda record=record: self.log.append(record))
        received = [torch.zeros(1, requires_grad=True) if asked[n] else None for n in ("recv_prev", "recv_next")]
        return *received, handles


class Chunk(torch.nn.Module):
    """Writes down its passes."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, number: int, log: list[Any], config: TransformerConfig) -> None:
        super().__init__()
        self.number, self.log, self.config = number, log, config
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.input: Tensor | None = None

    def set_input_tensor(self, given: list[Tensor | None]) -> None:
        self.input = given[0]

    def forward(self, microbatch: int) -> Tensor:
        self.log.append(("forward", self.number, microbatch))
        output = self.weight * (1 if self.input is None else self.input)
        output.register_hook(lambda _: self.log.append(("backward", self.number, microbatch)))
        return output


def recorded(shape: Shape, stage: int) -> list[Any]:
    """What megatron-core does on one stage, with rows of one length."""
    interleaved = shape.chunks > 1
    config = TransformerConfig(
        num_layers=shape.all_chunks,
        hidden_size=1,
        num_attention_heads=1,
        pipeline_model_parallel_size=shape.stages,
        virtual_pipeline_model_parallel_size=shape.chunks if interleaved else None,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=False,
    )
    post = Recorder(shape, stage, config)
    chunks = [Chunk(number * shape.stages + stage, post.log, config) for number in range(shape.chunks)]
    one: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups: Any = SimpleNamespace(tp=one, cp=one, embd=None, pos_embd=None, pp=post.pp_group, dp_cp=one)

    def forward_step(numbers: Iterator[int], model: Chunk) -> tuple[Tensor, Any]:
        return model(next(numbers)), lambda output: (output.sum(), {})

    schedule = (
        forward_backward_pipelining_with_interleaving
        if interleaved
        else forward_backward_pipelining_without_interleaving
    )
    schedule(
        forward_step_func=forward_step,
        data_iterator=[itertools.count() for _ in chunks] if interleaved else itertools.count(),
        model=chunks if interleaved else chunks[0],
        num_microbatches=shape.microbatches,
        seq_length=1,
        micro_batch_size=1,
        p2p_communicator=post,
        pg_collection=groups,
    )
    return post.log


def ours(steps: list[Step]) -> list[Any]:
    """Our program in the recorder's words."""
    log: list[Any] = []
    posted: dict[Any, tuple[int, str]] = {}
    for step in steps:
        if isinstance(step, Run):
            log.append((step.way, step.chunk, step.microbatch))
        elif isinstance(step, Post):
            posted |= {message: (len(log), "send") for message in step.sends}
            posted |= {message: (len(log), "recv") for message in step.receives}
            log.append(("post", len(step.sends), len(step.receives)))
        else:
            log += [("wait", *posted[message]) for message in step.messages]
    return log


def merged(log: list[Any]) -> list[Any]:
    """With each post that is waited for at once as one exchange."""
    found: list[Any] = []
    numbers: dict[int, int] = {}
    skip = 0
    for number, entry in enumerate(log):
        if skip:
            skip -= 1
            continue
        numbers[number] = len(found)
        if entry[0] == "wait":
            entry = ("wait", numbers[entry[1]], entry[2])
        elif entry[0] == "post":
            waits = log[number + 1 : number + 1 + entry[1] + entry[2]]
            if len(waits) == entry[1] + entry[2] and all(wait[:2] == ("wait", number) for wait in waits):
                entry, skip = ("exchange", *entry[1:]), len(waits)
        found.append(entry)
    return found


@pytest.fixture
def _fake_world() -> Iterator[None]:
    """Megatron-core takes groups for one process where none has been joined."""
    machine.prepare()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_fake_world")
@pytest.mark.parametrize("shape", ONE_CHUNK[::3] + INTERLEAVED[::4], ids=str)
def test_order_messages_and_waits_are_megatron_cores(shape: Shape) -> None:
    for stage in range(shape.stages):
        assert merged(ours(program(shape, stage, "fixed"))) == merged(recorded(shape, stage)), stage


@pytest.mark.parametrize("mode", MODES)
def test_every_message_has_two_ends_and_comes_before_it_is_needed(mode: Mode) -> None:
    for shape in ONE_CHUNK + INTERLEAVED:
        sent: Counter[Any] = Counter()
        received: Counter[Any] = Counter()
        for stage in range(shape.stages):
            waited: set[Message] = set()
            runs = []
            for step in program(shape, stage, mode):
                if isinstance(step, Post):
                    sent.update(step.sends)
                    received.update(step.receives)
                elif isinstance(step, Wait):
                    waited.update(step.messages)
                else:
                    runs.append(step)
                    assert needed(shape, step) is None or needed(shape, step) in waited
            assert runs == runs_of(shape, stage)
        assert sent == received and set(sent.values()) <= {1}


@pytest.mark.parametrize("mode", MODES)
def test_bubbles_of_even_stages_follow_the_closed_formula(mode: Mode) -> None:
    draw = random.Random(7)
    for stages, chunks in itertools.product((1, 2, 3, 4, 8), (1, 2, 3)):
        if stages == 1 and chunks > 1:
            continue
        for rounds in (1, 2, 5):
            microbatches = rounds * stages if chunks > 1 else draw.randint(1, 4 * stages)
            shape = Shape(stages, chunks, microbatches)
            forward, backward = draw.choice([(1, 2), (1, 1), (3, 1), (1, 0), (0.3, 0.71)])
            result = simulate(shape, work_of(shape, forward, backward), mode)
            assert result.bubble == pytest.approx((stages - 1) / (microbatches * chunks), abs=1e-9)
            ideal = microbatches * chunks * (forward + backward)
            assert result.seconds == pytest.approx(ideal + (stages - 1) * (forward + backward))
            assert result.idle_share == pytest.approx(1 - ideal / result.seconds)


def random_work(shape: Shape, seed: int, replicas: int = 1) -> Work:
    draw = np.random.default_rng(seed)
    size = (shape.all_chunks, shape.microbatches, replicas)
    backward = draw.uniform(0, 2, size) * (draw.random((shape.all_chunks, 1, 1)) < 0.7)
    return work_of(shape, draw.uniform(0, 1, size), backward, draw.uniform(0, 0.3, shape.stages), 0.05)


def finished_by_relaxation(shape: Shape, work: Work, mode: Mode) -> Floats:
    """When each stage is through: all moments are raised until each rule about two of them holds."""
    programs = [program(shape, stage, mode) for stage in range(shape.stages)]
    ends = [[0.0] * len(steps) for steps in programs]
    while True:
        posts: dict[Any, float] = {}
        for steps, of_stage in zip(programs, ends, strict=True):
            for step, end in zip(steps, of_stage, strict=True):
                for message in (*step.sends, *step.receives) if isinstance(step, Post) else ():
                    posts[message] = max(posts.get(message, 0.0), end)
        changed = False
        for steps, of_stage in zip(programs, ends, strict=True):
            now = 0.0
            for place, step in enumerate(steps):
                if isinstance(step, Run):
                    times = work.forward if step.way == "forward" else work.backward
                    now += times[step.chunk, step.microbatch, 0]
                elif isinstance(step, Wait):
                    for message in step.messages:
                        sender = message.chunk % shape.stages
                        left = sender if message.way == "forward" else (sender - 1) % shape.stages
                        seconds = work.handshake if message.is_shape else work.transfer[left]
                        seconds += work.handshake if shape.chunks == 1 else 0
                        now = max(now, posts[message] + seconds)
                changed |= now > of_stage[place]
                of_stage[place] = now
        if not changed:
            return np.array([of_stage[-1] for of_stage in ends])


@pytest.mark.parametrize("mode", MODES)
def test_uneven_work_takes_what_a_plain_reference_says(mode: Mode) -> None:
    draw = random.Random(11)
    for seed in range(12):
        stages, chunks = draw.choice([2, 3, 4]), draw.choice([1, 2, 3])
        shape = Shape(stages, chunks, stages * draw.randint(1, 3))
        work = random_work(shape, seed)
        np.testing.assert_allclose(
            simulate(shape, work, mode).finished[:, 0], finished_by_relaxation(shape, work, mode), rtol=1e-12
        )


def listed(shape: Shape, work: Work) -> float:
    """Each pass as early as its stage and what it starts from allow, in the order of megatron-core."""
    ends: dict[Run, float] = {}
    queues = [runs_of(shape, stage) for stage in range(shape.stages)]
    free = [0.0] * shape.stages
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                message = needed(shape, queue[0])
                source = None if message is None else Run(message.way, message.chunk, message.microbatch)
                if source is not None and source not in ends:
                    break
                run = queue.pop(0)
                arrived = 0.0
                if source is not None:
                    left = source.chunk if source.way == "forward" else source.chunk - 1
                    arrived = ends[source] + float(work.transfer[left % shape.stages])
                times = work.forward if run.way == "forward" else work.backward
                free[stage] = ends[run] = max(free[stage], arrived) + times[run.chunk, run.microbatch, 0]
    return max(free)


def test_hidden_messages_leave_what_list_scheduling_leaves_and_others_only_more() -> None:
    for seed, shape in enumerate(ONE_CHUNK + INTERLEAVED):
        work = random_work(shape, seed)
        work = Work(work.forward, work.backward, work.transfer)
        hidden, fixed, variable = (simulate(shape, work, mode).seconds for mode in ("hidden", "fixed", "variable"))
        assert hidden == pytest.approx(listed(shape, work))
        assert hidden <= fixed + 1e-9 and fixed <= variable + 1e-9


def test_replicas_are_what_each_would_be_alone() -> None:
    for shape in (Shape(1, 1, 5), Shape(3, 1, 7), Shape(2, 3, 6)):
        work = random_work(shape, 3, replicas=5)
        together = simulate(shape, work)
        alone = [simulate(shape, work.of_replica(replica)) for replica in range(5)]
        np.testing.assert_allclose(together.finished, np.concatenate([one.finished for one in alone], 1))
        np.testing.assert_allclose(together.busy, np.concatenate([one.busy for one in alone], 1))
        slowest = max(range(5), key=lambda replica: alone[replica].seconds)
        assert together.slowest == slowest and together.timeline == alone[slowest].timeline
        mean = np.mean([one.seconds for one in alone])
        assert together.imbalance == pytest.approx(1 - mean / alone[slowest].seconds)


def test_microbatches_in_flight_follow_the_known_rules() -> None:
    for shape in ONE_CHUNK + INTERLEAVED:
        stages, chunks, microbatches = shape
        for stage in range(stages):
            held = np.cumsum([1 if run.way == "forward" else -1 for run in runs_of(shape, stage)])
            if chunks == 1:
                known = min(stages - stage, microbatches)
            else:
                known = min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, chunks * microbatches)
            assert held.max() == known == in_flight(shape, stage) and held[-1] == 0


def test_the_timeline_holds_every_pass_once_and_no_two_at_a_time() -> None:
    shape = Shape(3, 2, 6)
    result = simulate(shape, random_work(shape, 1))
    assert Counter(timed.run for timed in result.timeline) == Counter(
        run for stage in range(3) for run in runs_of(shape, stage)
    )
    for stage in range(3):
        spans = sorted((timed.start, timed.end) for timed in result.timeline if timed.stage == stage)
        assert all(before[1] <= after[0] + 1e-12 for before, after in itertools.pairwise(spans))
        assert sum(end - start for start, end in spans) == pytest.approx(result.busy[stage, 0])
