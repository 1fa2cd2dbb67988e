"""The parallel layout as a setting: its degrees, and whether they fit the model and the number of processes.

Everything here is arithmetic on plain numbers, done on every rank before any process group exists, so that a wrong
degree ends at once and nowhere in a hang.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megavlm.config import Config, option, require
from megavlm.errors import LayoutError
from megavlm.model.decoder.config import DecoderConfig

AUTO = "auto"
"""The layout that is cut by cost."""
_LONGEST_TIMEOUT = 1_000_000
"""Minutes; two hundred times as many do not fit 64 bits when they are counted in nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """Degrees of parallelism; data parallelism takes the processes that tensor and pipeline leave."""

    tensor_model_parallel_size: int = 1
    """Ranks that share the weights of each layer."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    virtual_pipeline_model_parallel_size: int = option(1, name="--num-virtual-stages-per-pipeline-rank")
    """Chunks of layers a stage holds (more than 1: interleaved schedule)."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of each chunk by hand, as in Megatron: `Et|ttttL` (E embedding, t layer, L loss, | next chunk); or `auto`:
    cut by what each part costs, the vision tower and frozen parts included."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the sequence (no effect with one rank)."""

    vision_over: Literal["first_stage", "all_stages"] = "first_stage"
    """Who encodes images with a frozen tower: the first stage's ranks, or all stages' ahead of the schedule."""

    distributed_timeout_minutes: float = 10.0
    """Minutes that a process waits for the others, where they meet and in each collective, before the run ends. Frozen
    weights are written once, by one process of each stage, while all others wait: a slow disk needs more."""

    def check(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
        ):
            require(getattr(self, name) >= 1, self, name, "must be at least 1", "use 1 for none", error=LayoutError)
        require(
            self.pipeline_model_parallel_size > 1 or self.virtual_pipeline_model_parallel_size == 1,
            self,
            "virtual_pipeline_model_parallel_size",
            "needs more than one pipeline stage",
            "use 1, or raise pipeline_model_parallel_size",
            error=LayoutError,
        )
        require(
            0 < self.distributed_timeout_minutes <= _LONGEST_TIMEOUT,
            self,
            "distributed_timeout_minutes",
            f"is no time to wait for others (above 0, at most {_LONGEST_TIMEOUT})",
            "use 10, or more where a disk or a network is slow",
        )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def chunks(self) -> int:
        """Pieces the layers are cut into, over all stages."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size


def check_layout(parallel: ParallelConfig, decoder: DecoderConfig, world_size: int, where: str = "parallel") -> None:
    """Refuse degrees that do not divide the heads, the layers or the processes, naming the nearest that do."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for what, fits in _tensor_conditions(decoder):
        _refuse_unless(fits, tensor, f"{where}.tensor_model_parallel_size", what, _fits_all(decoder))
    if parallel.pipeline_model_parallel_layout is None:
        chunks_a_stage = parallel.virtual_pipeline_model_parallel_size
        _refuse_unless(
            lambda degree: decoder.num_layers % (degree * chunks_a_stage) == 0,
            pipeline,
            f"{where}.pipeline_model_parallel_size",
            f"{decoder.num_layers} layers do not divide into {pipeline} x {chunks_a_stage} equal chunks",
            or_else=" (or give the split by hand with pipeline_model_parallel_layout)",
        )
    else:
        _check_hand_made_layout(parallel, decoder, where)
    if world_size % parallel.model_parallel_size:
        raise LayoutError(
            f"{where}.tensor_model_parallel_size x pipeline_model_parallel_size",
            f"{tensor} x {pipeline}",
            f"{world_size} processes do not divide into groups of {parallel.model_parallel_size}",
            f"start a multiple of {parallel.model_parallel_size} processes, or use degrees whose product divides "
            f"{world_size}",
        )


def _tensor_conditions(decoder: DecoderConfig) -> list[tuple[str, Callable[[int], bool]]]:
    heads, groups, ffn = decoder.num_attention_heads, decoder.num_query_groups, decoder.ffn_hidden_size
    return [
        (f"does not divide {heads} attention heads", lambda degree: heads % degree == 0),
        (
            f"neither divides {groups} key-value heads nor is a multiple of them",
            lambda degree: groups % degree == 0 or degree % groups == 0,
        ),
        (f"does not divide the MLP width {ffn}", lambda degree: ffn % degree == 0),
    ]


def _fits_all(decoder: DecoderConfig) -> Callable[[int], bool]:
    return lambda degree: all(fits(degree) for _, fits in _tensor_conditions(decoder))


def _refuse_unless(
    fits: Callable[[int], bool],
    degree: int,
    where: str,
    problem: str,
    alternatives: Callable[[int], bool] | None = None,
    or_else: str = "",
) -> None:
    if fits(degree):
        return
    working = nearest_degrees(degree, alternatives or fits)
    raise LayoutError(where, degree, problem, f"use {' or '.join(map(str, working))}{or_else}")


def nearest_degrees(degree: int, works: Callable[[int], bool]) -> list[int]:
    """The nearest smaller and the nearest larger degree that work, as far as there are any."""
    smaller = next((d for d in range(degree - 1, 0, -1) if works(d)), None)
    larger = next((d for d in range(degree + 1, 4 * degree + 1) if works(d)), None)
    return [d for d in (smaller, larger) if d is not None]


def _check_hand_made_layout(parallel: ParallelConfig, decoder: DecoderConfig, where: str) -> None:
    layout = parallel.pipeline_model_parallel_layout
    assert layout is not None
    if layout == AUTO:
        _refuse_unless(
            lambda degree: degree * parallel.virtual_pipeline_model_parallel_size <= decoder.num_layers,
            parallel.pipeline_model_parallel_size,
            f"{where}.pipeline_model_parallel_size",
            f"leaves some of {parallel.chunks} chunks without one of the {decoder.num_layers} layers",
        )
        return
    chunks = layout.split("|")
    problem = None
    if set(layout) - set("EtL|"):
        problem = "knows only E, t, L and |"
    elif not (layout.startswith("E") and layout.endswith("L") and layout.count("E") == layout.count("L") == 1):
        problem = "must begin with its one E (embedding) and end with its one L (loss)"
    elif layout.count("t") != decoder.num_layers:
        problem = f"has {layout.count('t')} layers (t), the model has {decoder.num_layers}"
    elif len(chunks) != parallel.chunks:
        problem = f"has {len(chunks)} chunks, stages x chunks a stage are {parallel.chunks}"
    if problem:
        even = "|".join("t" * (decoder.num_layers // parallel.chunks) for _ in range(parallel.chunks))
        raise LayoutError(
            f"{where}.pipeline_model_parallel_layout", layout, problem, f"write it like E{even}L, or leave it out"
        )


def layers_of_chunks(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """How many layers each chunk of a checked layout holds."""
    if parallel.pipeline_model_parallel_layout is None:
        return [num_layers // parallel.chunks] * parallel.chunks
    return [chunk.count("t") for chunk in parallel.pipeline_model_parallel_layout.split("|")]


def layout_fields(parallel: ParallelConfig, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """The fields of TransformerConfig that the layout decides."""
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size if interleaved else None,
        "pipeline_model_parallel_layout": parallel.pipeline_model_parallel_layout,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        "pipeline_dtype": dtype,
        # Rows differ in length from microbatch to microbatch; megatron-core asks for this dispatcher beside it.
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,
        "moe_token_dispatcher_type": "alltoall",
        # Frees an output once its sending has been posted. Over gloo that is before it was read: the next stage then
        # got freed memory in 15 of 25 interleaved runs, and in 0 of 25 without.
        "deallocate_pipeline_outputs": backend == "nccl",
        "overlap_p2p_comm": interleaved,
        # Batched sends are matched by order alone: with two stages, interleaved, over gloo, the next and the previous
        # rank are the same and the messages are mixed up without a word.
        "batch_p2p_comm": backend == "nccl" and not interleaved,
    }
