"""The machine of a plan: chips, links, where the ranks of a layout sit, and how long their messages take.

Peaks and bandwidths are the makers' own, each with its source; a link's share that collectives reach and its latencies
follow NCCL's tuner. What a kernel reaches of a chip's peak is not said here: that is calibration.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megavlm.config import Config, nearest, require
from megavlm.errors import ConfigError, LayoutError
from megavlm.plan.cost import Efficiency
from megavlm.plan.profile import CommOp, GroupName

GIB = 1 << 30
OPTION = "--cluster"
MOST_GPUS = 1 << 17
MOST_PER_BOARD = 16
"""GPUs that one NVSwitch board joined at most (HGX A100 16-GPU); larger domains are described in a file."""
_WRITTEN = re.compile(r"(?:(\d+)\s*x\s*)?(\d+)\s*x\s*([a-z][\w.-]*)", re.IGNORECASE)

KERNEL_START = 8.4e-6
SMALL_KERNEL_START = 3.6e-6
"""Seconds before a collective's first step. NCCL src/graph/tuning.cc `baseLat`, ring: Simple, LL."""
SMALL_SHARE = 0.25
"""Of the bandwidth that is left to the protocol for small messages (same file: LL, several nodes)."""
TREE_INSIDE, TREE_BETWEEN = 28e-6, 50e-6
"""Seconds of a tree's step, which moves a 256 kB chunk (same file: `hwLat`, Tree/Simple)."""
TREE_SHARE = 0.9
"""Of the ring's bandwidth that a tree reaches (same file)."""


@dataclass(frozen=True, kw_only=True)
class Chip(Config):
    """One GPU: peaks as printed, dense."""

    name: str
    """What it is called."""
    bf16_tflops: float
    """10^12 floating-point operations a second in bf16 with fp32 accumulation, without sparsity."""
    fp8_tflops: float | None = None
    """The same in FP8; none: it has no FP8."""
    fp32_tflops: float | None = None
    """The same in float32 as torch computes it unless told otherwise, without TF32; none: it is not known."""
    capability: tuple[int, ...] | None = None
    """CUDA compute capability, such as [9, 0], which decides what a run in FP8 may ask for; none: it is not known."""
    memory_gib: float
    """GiB that CUDA reports in all: less than the name says, since the driver keeps some."""
    memory_gb_s: float
    """10^9 bytes a second to and from its memory."""

    def check(self) -> None:
        for field in ("bf16_tflops", "memory_gib", "memory_gb_s"):
            require(getattr(self, field) > 0, self, field, "must be positive", "write what its data sheet says")
        are_two = self.capability is None or len(self.capability) == 2
        require(are_two, self, "capability", "is no compute capability", "write two numbers, such as [9, 0]")
        for field in ("fp8_tflops", "fp32_tflops"):
            value = getattr(self, field)
            require(value is None or value > 0, self, field, "must be positive", "leave it out")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def bytes_per_second(self) -> float:
        return self.memory_gb_s * 1e9

    def flops_per_second(self, in_float32: bool) -> float:
        """Its peak in float32 or in bf16."""
        if not in_float32:
            return 1e12 * self.bf16_tflops
        if self.fp32_tflops is None:
            problem = f"is not given of the chip {self.name}, and the run is in float32"
            remedy = "write what its data sheet says of FP32 without TF32, or use --params-dtype bfloat16"
            raise ConfigError("Chip.fp32_tflops", None, problem, remedy)
        return 1e12 * self.fp32_tflops


@dataclass(frozen=True, kw_only=True)
class Link(Config):
    """What one GPU sends over one kind of link."""

    gb_s: float
    """10^9 bytes a second in one direction, as printed."""
    reached: float = 0.9
    """Share of it that large collectives reach."""
    latency_us: float
    """Microseconds of one step of a collective of large messages."""
    small_latency_us: float
    """The same of small ones, for which another protocol is taken."""

    def check(self) -> None:
        for field in ("gb_s", "latency_us", "small_latency_us"):
            require(getattr(self, field) > 0, self, field, "must be positive", "write what was measured")
        require(0 < self.reached <= 1, self, "reached", "is outside (0, 1]", "use for example 0.9")

    @property
    def bytes_per_second(self) -> float:
        return self.gb_s * 1e9 * self.reached

    @property
    def latency(self) -> float:
        return self.latency_us * 1e-6

    @property
    def small_latency(self) -> float:
        return self.small_latency_us * 1e-6


@dataclass(frozen=True)
class Span:
    """Where the ranks of one group sit."""

    ranks: int
    nodes: int
    per_node: int
    """Ranks of the group on the node that holds the fewest of them; as many network cards carry its traffic."""


@dataclass(frozen=True, kw_only=True)
class Cluster(Config):
    """Equal nodes of equal GPUs."""

    nodes: int
    """Machines."""
    gpus_per_node: int
    """GPUs of each, joined by `inside`."""
    chip: Chip
    """The GPU; in a file also the name of a known one."""
    inside: Link
    """Between GPUs of a node; in a file that of a known chip if left out."""
    between: Link
    """Between nodes, of one GPU's own card; in a file that of a known chip if left out."""
    cores_per_gpu: float = 16.0
    """CPU cores of a machine for each of its GPUs, which read and decode. 16: two of 64 cores for 8 GPUs (NVIDIA DGX
    A100 data sheet); a DGX H100 has 14."""
    efficiency: Efficiency | None = None
    """What was measured on these very machines; none: a calibration file says what is reached of the chip."""

    def check(self) -> None:
        require(self.nodes >= 1, self, "nodes", "must be at least 1", "count the machines")
        require(self.gpus_per_node >= 1, self, "gpus_per_node", "must be at least 1", "count the GPUs of a machine")
        require(self.cores_per_gpu > 0, self, "cores_per_gpu", "must be positive", "count a machine's cores and GPUs")
        problem = f"x {self.gpus_per_node} GPUs are more than the {MOST_GPUS:,} that a plan can hold"
        require(self.gpus <= MOST_GPUS, self, "nodes", problem, "use fewer")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """As of any settings; the name of a known chip stands for its data and, where they are left out, its links."""
        name = data.get("chip") if isinstance(data, Mapping) else None
        if isinstance(name, str):
            board = known_board(name, "Cluster.chip")
            data = {"inside": board.inside.to_dict(), "between": board.between.to_dict(), **data}
            data["chip"] = board.chip.to_dict()
        return super().from_dict(data)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def name(self) -> str:
        return f"{self.nodes}x{self.gpus_per_node}x{self.chip.name}"

    def with_gpus(self, gpus: int) -> Self:
        """The same machines, as many as so many GPUs take; a part of one machine where one has more."""
        if gpus <= self.gpus_per_node:
            return self.replace(nodes=1, gpus_per_node=gpus)
        if gpus % self.gpus_per_node:
            whole = gpus // self.gpus_per_node * self.gpus_per_node
            problem = f"are no whole machines of {self.gpus_per_node}"
            raise LayoutError("GPUs", gpus, problem, f"use {whole} or {whole + self.gpus_per_node}")
        return self.replace(nodes=gpus // self.gpus_per_node)

    def span(self, group: GroupName, tensor: int, pipeline: int) -> Span:
        """Where a group of a layout sits; of several like it, the one spread widest."""
        return _span(self.gpus, self.gpus_per_node, group, tensor, pipeline)

    def crossings(self, tensor: int, pipeline: int) -> list[bool]:
        """Whether the way from each stage to the next leaves the node; the last entry is the way back to the first."""
        ranks = _placed(self.gpus, tensor, pipeline) // self.gpus_per_node
        return [bool(np.any(ranks[stage] != ranks[(stage + 1) % pipeline])) for stage in range(pipeline)]

    def collective_seconds(self, op: CommOp, size: float, span: Span) -> float:
        """Seconds of a collective over `size` bytes: the full reduced, gathered or sent tensor."""
        if span.ranks <= 1 or not op:
            return 0.0
        if op == "p2p":
            return self.p2p_seconds(size, span.nodes > 1)
        passes, steps_of = _RING[op](span.ranks)
        between = (span.nodes - 1) * steps_of
        inside = (span.ranks - 1) * steps_of - between
        bandwidth = self._bandwidth(span)
        ring = KERNEL_START + inside * self.inside.latency + between * self.between.latency
        small = SMALL_KERNEL_START + inside * self.inside.small_latency + between * self.between.small_latency
        times = [ring + passes * size / bandwidth, small + passes * size / (SMALL_SHARE * bandwidth)]
        if op == "all_reduce":
            deep = (span.per_node - 1) * TREE_INSIDE + math.log2(span.nodes) * TREE_BETWEEN
            times.append(2 * deep + 2 * size / (TREE_SHARE * bandwidth))
        return min(times)

    def p2p_seconds(self, size: float, leaves_node: bool) -> float:
        """Seconds until a message of one rank has reached another."""
        link = self.between if leaves_node else self.inside
        large = KERNEL_START + link.latency + size / link.bytes_per_second
        small = SMALL_KERNEL_START + link.small_latency + size / (SMALL_SHARE * link.bytes_per_second)
        return min(large, small)

    def _bandwidth(self, span: Span) -> float:
        """Bytes a second that each rank passes on. A ring crosses nodes once for each of its ranks there."""
        if span.nodes == 1:
            return self.inside.bytes_per_second
        if span.per_node == 1:
            return self.between.bytes_per_second
        return min(self.inside.bytes_per_second, span.per_node * self.between.bytes_per_second)


_RING = {  # ranks -> (times the whole tensor passes through each rank's link, rounds around the ring)
    "all_reduce": lambda ranks: (2 * (ranks - 1) / ranks, 2),
    "all_gather": lambda ranks: ((ranks - 1) / ranks, 1),
    "reduce_scatter": lambda ranks: ((ranks - 1) / ranks, 1),
    "all_to_all": lambda ranks: ((ranks - 1) / ranks, 1),
    "broadcast": lambda ranks: (1.0, 1),
}


def _placed(gpus: int, tensor: int, pipeline: int) -> NDArray[np.int64]:
    """[stage, data rank, tensor rank] -> rank, as megatron-core numbers them: tensor fastest, stages slowest."""
    return np.arange(gpus).reshape(pipeline, gpus // (tensor * pipeline), tensor)


@functools.lru_cache(maxsize=4096)
def _span(gpus: int, gpus_per_node: int, group: GroupName, tensor: int, pipeline: int) -> Span:
    ranks = _placed(gpus, tensor, pipeline)
    stages, data, tensors = ranks.shape
    groups = {
        "tp": ranks.reshape(stages * data, tensors),
        "pp": ranks.reshape(stages, data * tensors).T,
        "dp": ranks.transpose(0, 2, 1).reshape(stages * tensors, data),
        "mp": ranks.transpose(1, 0, 2).reshape(data, stages * tensors),
        "world": ranks.reshape(1, gpus),
    }[group]
    counts = [np.unique(row, return_counts=True)[1] for row in groups // gpus_per_node]
    widest = max(counts, key=lambda count: (len(count), -count.min()))
    return Span(ranks=groups.shape[1], nodes=len(widest), per_node=int(widest.min()))


@dataclass(frozen=True)
class Board:
    """A chip with the links that its maker's servers have."""

    chip: Chip
    inside: Link
    between: Link


def _a100(name: str, **memory: float) -> Chip:
    return Chip(name=name, bf16_tflops=312, fp32_tflops=19.5, capability=(8, 0), **memory)


def _hopper(name: str, **memory: float) -> Chip:
    # The peak that training's log has MFU as a share of.
    return Chip(name=name, bf16_tflops=989, fp8_tflops=1979, fp32_tflops=67, capability=(9, 0), **memory)


# Network: one ConnectX-6 of 200 Gbit/s a GPU (NVIDIA DGX A100 data sheet), one ConnectX-7 of 400 Gbit/s (NVIDIA DGX
# H100/H200 data sheet). Latencies: NCCL tuning.cc `hwLat`, ring, Simple and LL. Shares reached: NVLink of A100, where
# NCCL's tuner caps its estimate at 235 of 300 GB/s (`compCap80`); all others are assumed.
_NVLINK3 = Link(gb_s=300, reached=0.78, latency_us=3.4, small_latency_us=0.47)
_NVLINK4 = Link(gb_s=450, reached=0.8, latency_us=3.4, small_latency_us=0.47)
_HDR = Link(gb_s=25, reached=0.9, latency_us=9.6, small_latency_us=2.7)
_NDR = Link(gb_s=50, reached=0.9, latency_us=9.6, small_latency_us=2.7)

# A100: NVIDIA A100 data sheet (SXM: bf16 312, FP32 19.5; 1,555 and 2,039 GB/s, NVLink 600 GB/s both ways). H100: NVIDIA
# H100 data sheet (SXM: bf16 1,979 and FP8 3,958 with sparsity, twice the dense ones; FP32 67; 3.35 TB/s; NVLink 900
# GB/s both ways). H200: NVIDIA H200 data sheet (as H100, 141 GB, 4.8 TB/s). FP32 is what torch's products in float32
# take: TF32 is off unless `torch.set_float32_matmul_precision` asks for it, which training never does. Memory as CUDA
# reports it: A100-40GB 42,405,855,232 bytes (deviceQuery in the wiki of Paderborn's PC2), A100-80GB 79.25 GiB
# (levihsu/OOTDiffusion#235), H100 79.11 GiB (vllm-project/vllm#27508); H200 is rounded down.
BOARDS: dict[str, Board] = {
    board.chip.name: board
    for board in (
        Board(_a100("A100-40GB", memory_gib=39.49, memory_gb_s=1555), _NVLINK3, _HDR),
        Board(_a100("A100-80GB", memory_gib=79.25, memory_gb_s=2039), _NVLINK3, _HDR),
        Board(_hopper("H100", memory_gib=79.11, memory_gb_s=3350), _NVLINK4, _NDR),
        Board(_hopper("H200", memory_gib=139, memory_gb_s=4800), _NVLINK4, _NDR),
    )
}


def known_board(name: str, where: str = OPTION, written: str | None = None) -> Board:
    """The known chip of this name, in any case of letters; an error that names the nearest otherwise."""
    by_name = {known.casefold(): board for known, board in BOARDS.items()}
    if name.casefold() in by_name:
        return by_name[name.casefold()]
    starts = [known for known in BOARDS if known.casefold().startswith(name.casefold())]
    close = nearest(name.upper(), [known.upper() for known in BOARDS])
    if starts:
        problem, remedy = f"names {name}, which may be {' or '.join(starts)}", "write which"
    else:
        guess = f"did you mean {by_name[close.casefold()].chip.name}? Known are" if close else "known are"
        problem = f"names {name}, which is no known chip"
        remedy = f"{guess} {', '.join(BOARDS)}; any other is described in a YAML file"
    raise ConfigError(where, written or name, problem, remedy)


def parse_cluster(written: str) -> Cluster:
    """`5x8xA100-80GB` (machines x GPUs of each x chip; one machine: `8xH100`), or a YAML or JSON file."""
    if written.endswith((".yaml", ".yml", ".json")):
        return Cluster.load(written)
    found = _WRITTEN.fullmatch(written.strip())
    if found is None:
        remedy = "write machines x GPUs of each x chip, such as 5x8xA100-80GB, or name a .yaml file"
        raise ConfigError(OPTION, written, "is no cluster", remedy)
    nodes, gpus, chip = found.groups()
    board = known_board(chip, OPTION, written)
    nodes, gpus = int(nodes or 1), int(gpus)
    if gpus > MOST_PER_BOARD:
        problem = f"has {gpus} GPUs in a machine, which {board.chip.name}'s boards do not join"
        raise ConfigError(OPTION, written, problem, f"use at most {MOST_PER_BOARD}, or describe it in a YAML file")
    for count, what in ((nodes, "machines"), (gpus, "GPUs in a machine")):
        if not count:
            raise ConfigError(OPTION, written, f"has 0 {what}", "use 1 or more")
    if nodes * gpus > MOST_GPUS:
        problem = f"has {nodes * gpus:,} GPUs, more than the {MOST_GPUS:,} that a plan can hold"
        raise ConfigError(OPTION, written, problem, "use fewer")
    return Cluster(nodes=nodes, gpus_per_node=gpus, chip=board.chip, inside=board.inside, between=board.between)
