"""The pipeline: which layers this process holds, as one model chunk for each virtual stage."""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.model import Decoder, build_decoder
from megavlm.model.decoder.spec import architecture_fields
from megavlm.parallel.groups import Groups
from megavlm.parallel.layout import ParallelConfig


def build_chunks(
    decoder: DecoderConfig,
    fields: dict[str, Any],
    parallel: ParallelConfig,
    groups: Groups,
    provider: BackendSpecProvider,
    vocab_divisor: int,
) -> list[Decoder]:
    """This process's chunks of the decoder, with uninitialised weights.

    `fields` are those of TransformerConfig that layout, precision and recompute decide.
    """
    config = TransformerConfig(**architecture_fields(decoder), **fields)
    virtual = parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if virtual == 1 else list(range(virtual))
    return [
        build_decoder(
            decoder,
            config,
            groups.collection,
            pre_process=is_pp_first_stage(groups.collection.pp) and is_vp_first_stage(stage, virtual),
            post_process=is_pp_last_stage(groups.collection.pp) and is_vp_last_stage(stage, virtual),
            vp_stage=stage,
            provider=provider,
            vocab_divisor=vocab_divisor,
        )
        for stage in stages
    ]
