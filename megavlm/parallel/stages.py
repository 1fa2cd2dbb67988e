"""The pipeline: which layers this process holds, as one model chunk for each virtual stage."""

from __future__ import annotations

from typing import Any, Protocol

from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.model import Decoder
from megavlm.model.decoder.spec import architecture_fields
from megavlm.parallel.groups import Groups
from megavlm.parallel.layout import ParallelConfig


class ChunkBuilder(Protocol):
    """Makes one pipeline chunk of a model family."""

    def __call__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> Decoder: ...


def build_chunks(
    build_chunk: ChunkBuilder, decoder: DecoderConfig, fields: dict[str, Any], parallel: ParallelConfig, groups: Groups
) -> list[Decoder]:
    """This process's chunks, with uninitialised weights.

    `fields` are those of TransformerConfig that layout, precision and recompute decide.
    """
    config = TransformerConfig(**architecture_fields(decoder), **fields)
    virtual = parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if virtual == 1 else list(range(virtual))
    return [
        build_chunk(
            config,
            groups.collection,
            pre_process=is_pp_first_stage(groups.collection.pp) and is_vp_first_stage(stage, virtual),
            post_process=is_pp_last_stage(groups.collection.pp) and is_vp_last_stage(stage, virtual),
            vp_stage=stage,
        )
        for stage in stages
    ]
