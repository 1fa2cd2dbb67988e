"""What one rank of one pipeline stage holds and does: the contract between the trace and all that reckons with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PlanPart = Literal["tower", "connector", "cross_attention", "decoder", "head", "optimizer", "data", "pipeline"]
"""Where in the model work is done. `head`: embedding's output layer and loss; `connector`: projector or resampler,
with the embedding of text and its splicing; `data`: moving rows and tiles over model-parallel ranks; `pipeline`: what
passes between stages."""
Kind = Literal["matmul", "attention", "memory", "comm"]
"""What bounds the work: matrix products, attention, memory traffic (elementwise, norms, copies), a network."""
Phase = Literal["forward", "backward", "recompute", "step"]
"""`step` is done once a step; all others once a microbatch. Forward work on `data` and a tower encoding ahead are
`forward` as well."""
GroupName = Literal["", "tp", "pp", "dp", "mp", "world"]
"""Tensor, pipeline, data, all model-parallel ranks, all ranks."""
CommOp = Literal["", "all_reduce", "all_gather", "reduce_scatter", "p2p", "broadcast", "all_to_all"]


@dataclass(frozen=True, kw_only=True)
class OpCost:
    """One class of work of one microbatch on one rank (phase `step`: of one step)."""

    part: PlanPart
    kind: Kind
    phase: Phase
    flops: float = 0.0
    """Executed on this rank, a multiply-add counting two."""
    bytes: float = 0.0
    """Read and written by all operations of the class; of `comm`, the whole messages: the tensors that are reduced, the
    gathered ones, those that are scattered or sent. A ring's factor (n-1)/n or 2(n-1)/n is the cluster's business."""
    made: float = 0.0
    """Bytes of tensors that the operations allocate."""
    group: GroupName = ""
    """Of `comm` alone: the ranks that take part."""
    op: CommOp = ""
    """Of `comm` alone."""
    count: int = 1
    """Operations (kernel launches, messages) in the class."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on one rank, each tensor counted once."""

    weights: int
    """All parameters and buffers of the model, frozen ones included."""
    gradients: int
    """The gradient buffers."""
    optimizer: int
    """Master weights and moments of this rank's share."""
    activations: int
    """What the step allocates, at its peak: activations of all microbatches in flight, temporaries, gradients of
    activations."""
    batch: int = 0
    """The step's microbatches themselves, tokens and pixels, which wait on the device from its beginning."""
    communication: int = 0
    """Buffers of the communication library, assumed."""

    @property
    def static(self) -> int:
        """What lives from the first step to the last."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Everything but the allocator's slack."""
        return self.static + self.activations + self.batch + self.communication


@dataclass(frozen=True, kw_only=True)
class RowProfile:
    """What one kind of row costs a stage."""

    name: str
    """`mean`, `worst` or `long`."""
    tokens: int
    """Of one microbatch."""
    length: int
    """The same with padding."""
    documents: int
    images: int
    """Images or tiles of one microbatch that the tower encodes."""
    costs: tuple[OpCost, ...]
    """Over all chunks of the stage; phases but `step` are of one microbatch."""
    activation_per_microbatch: int
    """Held from a microbatch's forward to its backward, over all chunks of the stage."""
    transient: int
    """Peak above what is held, within one forward or backward."""
    memory: MemoryUse
    """With as many microbatches in flight as the schedule has on this stage."""


@dataclass(frozen=True, kw_only=True)
class StageProfile:
    """One rank of one pipeline stage, first of its tensor-parallel group."""

    stage: int
    chunks: int
    """Model chunks on the rank: 1, or more where the schedule interleaves."""
    layers: int
    """Decoder layers over all chunks."""
    in_flight: int
    """Microbatches in flight at most (of interleaving: chunk-microbatches)."""
    parameters: int
    """Elements of all parameters on the rank."""
    trainable: int
    """Elements that learn."""
    mean: RowProfile
    worst: RowProfile
    long: RowProfile | None = None
    """The mean row with more words; none: tokens are not told apart from images."""

    def row(self, name: Literal["mean", "worst"]) -> RowProfile:
        """The profile of one kind of row."""
        return self.mean if name == "mean" else self.worst
