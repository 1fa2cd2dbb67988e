"""Attention and packing kernels of megavlm: each op is a folder with its plain truth beside the Triton kernel."""

from __future__ import annotations

from megavlm_kernels.assemble.op import sequence_assemble
from megavlm_kernels.assemble.schedule import AssembleSchedule, assemble_schedule
from megavlm_kernels.dispatch import use
from megavlm_kernels.gated.op import gated_residual
from megavlm_kernels.media.op import media_attention
from megavlm_kernels.media.schedule import MediaSchedule, media_schedule
from megavlm_kernels.resampler.op import resampler_attention
from megavlm_kernels.tiles.op import tile_pack

__all__ = [
    "AssembleSchedule",
    "MediaSchedule",
    "assemble_schedule",
    "gated_residual",
    "media_attention",
    "media_schedule",
    "resampler_attention",
    "sequence_assemble",
    "tile_pack",
    "use",
]
