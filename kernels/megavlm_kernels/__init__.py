"""Attention and packing kernels of megavlm: each op is a folder with its plain truth beside the Triton kernel."""

from __future__ import annotations

from megavlm_kernels.dispatch import use
from megavlm_kernels.gated.op import gated_residual
from megavlm_kernels.media.op import media_attention
from megavlm_kernels.media.schedule import MediaSchedule, media_schedule
from megavlm_kernels.resampler.op import resampler_attention

__all__ = ["MediaSchedule", "gated_residual", "media_attention", "media_schedule", "resampler_attention", "use"]
