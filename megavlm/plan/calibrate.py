"""This machine's CPU measured, so that runs on it can be planned: `megavlm plan --calibrate FILE`.

A decoder is trained for some steps on rows of several lengths, and its operations are timed one by one: rates of
products, attention and memory follow from how their times grow with their size. What an operation takes whatever its
size, Python's and megatron-core's share included, follows from a decoder so small that nothing else counts; what the
timing of single operations leaves out, from whole steps of the first.

Other work on the machine shows in steps that should take equally long and do not: then more rounds are measured, the
fastest count, and where these differ as well, that is said.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megavlm.batch import TextBatch
from megavlm.build.run_config import DecoderConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from megavlm.data.files import atomic_file
from megavlm.data.toy_text import toy_step
from megavlm.errors import ConfigError
from megavlm.parallel import groups as process_groups
from megavlm.parallel.groups import Groups
from megavlm.parallel.schedule import forward_backward
from megavlm.parallel.wrap import gradient_norm, update_weights
from megavlm.plan.cluster import GIB, Chip, Cluster, Link
from megavlm.plan.cost import Efficiency
from megavlm.plan.fit import MachineTimes, TimedWork, Timing, fitted
from megavlm.plan.follow import Follower
from megavlm.plan.places import Place, Places
from megavlm.plan.trace import build_rank
from megavlm.plan.work import Work

CHIP = "this-CPU"
TOKENS = (32, 128, 512)
"""Of the rows of the timed decoder."""
SMALL_TOKENS = 16
ROUNDS = 3
"""That count."""
MOST_ROUNDS = 9
"""That are measured where no three of them agree."""
UNLIKE = 1.5
"""So many times the fastest, a step of the same work was disturbed: those of a quiet machine differ by 5 %."""
SMALL_STEPS = 6
"""Of the small decoder in each round."""
PRODUCT = 1024
COPIED = 1 << 26
"""Elements of a copy that no cache holds."""


def timed_run(quick: bool = False) -> RunConfig:
    """A decoder of 20M parameters; `quick`: a toy."""
    return _run(32, 2, 500) if quick else _run(448, 6, 8000)


def small_run() -> RunConfig:
    """A decoder whose arithmetic takes no time."""
    return _run(32, 5, 64, microbatches=3)


def _run(width: int, layers: int, vocabulary: int, microbatches: int = 1) -> RunConfig:
    heads = max(width // 64, 2)
    return RunConfig(
        name="calibration",
        decoder=DecoderConfig(
            num_layers=layers,
            hidden_size=width,
            ffn_hidden_size=width * 8 // 3,
            num_attention_heads=heads,
            num_query_groups=heads,
            kv_channels=width // heads,
            vocab_size=vocabulary,
        ),
        precision=PrecisionConfig(params_dtype="float32"),
        train=TrainConfig(global_batch_size=microbatches, micro_batch_size=1, seq_length=SMALL_TOKENS),
    )


class TimingFollower(Follower):
    """Follows a real step and times each operation; where it belongs in the model is not asked."""

    def __init__(self) -> None:
        super().__init__(Places())
        self.works: list[TimedWork] = []
        self._seconds = 0.0

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        began = time.perf_counter()
        out = func(*args, **kwargs)
        self._seconds = time.perf_counter() - began
        return out

    def worked(self, place: Place, work: Work, made: int) -> None:
        self.works.append(TimedWork(*work, made, self._seconds))


@dataclass
class TimedDecoder:
    """A decoder that learns, its steps timed as a whole and operation by operation, by the length of its rows."""

    run: RunConfig
    groups: Groups
    wholes: dict[int, list[float]] = field(default_factory=dict)
    followed: dict[int, list[list[TimedWork]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rank = build_rank(self.run, self.groups)
        self.rank.places.unwatch()

    def round(self, tokens: int) -> None:
        """One step as it is, one operation by operation."""
        batches = self._batches(tokens)
        began = time.perf_counter()
        self._step(batches)
        self.wholes.setdefault(tokens, []).append(time.perf_counter() - began)
        with TimingFollower() as follower:
            self._step(batches)
        self.followed.setdefault(tokens, []).append(follower.works)

    def forget(self) -> None:
        """Count from now on."""
        self.wholes.clear()
        self.followed.clear()

    def timing(self, tokens: int, most: int) -> Timing:
        """What the fastest of this length say, at most so many, each operation by the middle one of its times."""
        wholes = self.wholes[tokens]
        fastest = sorted(range(len(wholes)), key=wholes.__getitem__)[:most]
        followed = [self.followed[tokens][number] for number in fastest]
        counts = Counter(map(len, followed))
        usual = counts.most_common(1)[0][0]  # an address that is used again now and then hides an operation
        same = zip(*(works for works in followed if len(works) == usual), strict=True)
        works = [works[0]._replace(seconds=median(work.seconds for work in works)) for works in same]
        return Timing(median(wholes[number] for number in fastest), works)

    def _step(self, batches: Sequence[TextBatch]) -> None:
        """As training takes it."""
        self.rank.optimizer.zero_grad()
        forward_backward(self.rank.wrapped, batches, self.groups)
        update_weights(self.rank.optimizer, gradient_norm(self.rank.optimizer))

    def _batches(self, tokens: int) -> list[TextBatch]:
        return toy_step(
            seed=self.run.train.seed,
            step=0,
            global_batch_size=self.run.samples_per_step,
            micro_batch_size=self.run.train.micro_batch_size,
            seq_length=tokens,
            vocab_size=self.run.decoder.vocab_size,
            data_rank=0,
            data_size=1,
        )


def calibrate(place: str) -> str:
    """Measure this machine and write what was found; that, in words."""
    path = Path(place)
    if path.suffix not in (".yaml", ".yml") or path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError("--calibrate", place, "cannot be written", "name a .yaml file in a folder that exists")
    process_groups.join()
    try:
        meter = Meter(process_groups.start(ParallelConfig()))
        cluster = meter.cluster()
    finally:
        process_groups.leave()
    with atomic_file(path) as file:
        file.write(cluster.to_yaml().encode())
    said = f"this CPU as a cluster: {place}; plan with --cluster {place}"
    return said if meter.disturbed is None else f"{said}\n{_warning(*meter.disturbed)}"


def _warning(fastest: float, slowest: float) -> str:
    return (
        f"warning: something else computes on this machine, for steps of the same work took between "
        f"{1000 * fastest:,.0f} and {1000 * slowest:,.0f} ms: its plans can be far off; calibrate again when it is idle"
    )


def disturbed(wholes: Iterable[Sequence[float]], rounds: int = ROUNDS) -> tuple[float, float] | None:
    """Of steps of several sorts, (fastest, slowest) of the sort whose times differ most among its fastest ones; none
    where all of them agree."""
    extremes = [(min(times), sorted(times)[:rounds][-1]) for times in wholes]
    fastest, slowest = max(extremes, key=lambda both: both[1] / both[0])
    return (fastest, slowest) if slowest > UNLIKE * fastest else None


class Meter:
    """Measures this machine, as often as it is asked, as a cluster of one process with torch's threads."""

    def __init__(self, groups: Groups, quick: bool = False) -> None:
        """`quick` measures nothing worth knowing."""
        self.quick = quick
        self.timed, self.small = TimedDecoder(timed_run(quick), groups), TimedDecoder(small_run(), groups)
        self._round()  # the first steps allocate

    def cluster(self) -> Cluster:
        """What it is now."""
        self.timed.forget()
        self.small.forget()
        for number in range(1 if self.quick else MOST_ROUNDS):
            if number >= ROUNDS and self.disturbed is None:
                break
            self._round()
        large = [self.timed.timing(tokens, ROUNDS) for tokens in TOKENS]
        times = fitted(large, self.small.timing(SMALL_TOKENS, ROUNDS * SMALL_STEPS))
        peaks = {dtype: _product_rate(dtype, self.quick) for dtype in (torch.float32, torch.bfloat16)}
        return cluster_of(times, peaks[torch.float32], peaks[torch.bfloat16], _copy_rate(self.quick))

    @property
    def disturbed(self) -> tuple[float, float] | None:
        """(fastest, slowest) of steps that should have taken equally long, in the rounds that count."""
        return disturbed(self.timed.wholes.values())

    def _round(self) -> None:
        for tokens in TOKENS:
            self.timed.round(tokens)
        for _ in range(SMALL_STEPS):
            self.small.round(SMALL_TOKENS)


def cluster_of(times: MachineTimes, float32: float, bfloat16: float, copied: float) -> Cluster:
    """What was measured, as a cluster file says it; of peaks, in operations and bytes a second, the higher counts."""
    peak = max(float32, times.matmul, times.attention)
    bandwidth = max(copied, times.memory)
    threads = torch.get_num_threads()
    says = f"measured on this machine with {threads} threads, in float32"
    # Nobody else is there to send to; what several processes of one machine reach of each other was not measured.
    link = Link(gb_s=1.0, latency_us=100.0, small_latency_us=100.0)
    return Cluster(
        nodes=1,
        gpus_per_node=1,
        cores_per_gpu=float(len(os.sched_getaffinity(0))),
        chip=Chip(
            name=CHIP,
            bf16_tflops=bfloat16 / 1e12,
            fp32_tflops=peak / 1e12,
            memory_gib=_memory_bytes() / GIB,
            memory_gb_s=bandwidth / 1e9,
        ),
        inside=link,
        between=link,
        efficiency=Efficiency(
            matmul=times.matmul / peak,
            attention=times.attention / peak,
            memory=times.memory / bandwidth,
            operands=min(times.operands / bandwidth, 1.0),
            allocated=min(times.allocated / bandwidth, 1.0),
            start_us=times.start * 1e6,
            hides=False,
            sources=dict.fromkeys(("matmul", "attention", "memory", "operands", "allocated", "start_us"), says),
        ),
    )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _product_rate(dtype: torch.dtype, quick: bool) -> float:
    """Operations a second of one large product."""
    size = PRODUCT // 16 if quick else PRODUCT
    left, right = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / _fastest(lambda: left @ right)


def _copy_rate(quick: bool) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(COPIED // 1024 if quick else COPIED)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def _fastest(work: Callable[[], Any]) -> float:
    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return min(once() for _ in range(5))
