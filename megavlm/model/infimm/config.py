"""What InfiMM adds to its decoder, and how the released config.json spells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megavlm.config import Config, require
from megavlm.errors import ConfigError
from megavlm.model.cross_attention import CrossAttentionConfig
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.resampler import ResamplerConfig
from megavlm.model.towers.eva_config import EvaConfig

_KINDS = {"infimm-zephyr": "mistral", "infimm-vicuna": "llama", "infimm-llama": "llama"}


@dataclass(frozen=True, kw_only=True)
class InfiMMConfig(Config):
    """The parts around the decoder."""

    model_type: str
    """infimm-zephyr, infimm-vicuna or infimm-llama: which chat format and decoder the folder names."""
    tower: EvaConfig
    """The vision tower."""
    resampler: ResamplerConfig
    """From an image's tokens to its latents."""
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    """The gated blocks."""
    image_token_id: int = 32001
    """The token that stands for an image."""
    eoc_token_id: int = 32000
    """The token that ends what was said of an image."""

    def check(self) -> None:
        require(self.model_type in _KINDS, self, "model_type", "is no InfiMM", f"use one of {', '.join(_KINDS)}")
        require(
            self.resampler.width == self.tower.width,
            self,
            "resampler.width",
            f"is not the tower's width {self.tower.width}",
            f"use {self.tower.width}",
        )


def infimm_from_hf(hf: dict[str, Any], where: str = "config.json") -> tuple[DecoderConfig, InfiMMConfig]:
    """The decoder and the parts around it, out of the released config.json."""
    kind = hf.get("model_type")
    if kind not in _KINDS:
        raise ConfigError(f"{where}: model_type", kind, "is no InfiMM", f"use one of {', '.join(_KINDS)}")
    for key in ("visual", "language", "cross_attn_every_n_layers", "image_token_id", "eoc_token_id"):
        if key not in hf:
            raise ConfigError(f"{where}: {key}", None, "is missing", "take the folder as it was released")
    decoder = DecoderConfig.from_hf({**hf["language"], "model_type": _KINDS[kind]}, f"{where}: language")
    tower = EvaConfig.from_hf(hf["visual"], f"{where}: visual")
    parts = InfiMMConfig(
        model_type=kind,
        tower=tower,
        resampler=ResamplerConfig(width=tower.width),
        cross_attention=CrossAttentionConfig(every_n_layers=hf["cross_attn_every_n_layers"]),
        image_token_id=hf["image_token_id"],
        eoc_token_id=hf["eoc_token_id"],
    )
    return decoder, parts
