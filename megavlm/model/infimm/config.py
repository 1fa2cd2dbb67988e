"""What InfiMM adds to its decoder, and how the released config.json spells it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megavlm.config import Config, require
from megavlm.errors import ConfigError
from megavlm.model.cross_attention import CrossAttentionConfig
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.resampler import ResamplerConfig
from megavlm.model.towers.eva_config import EvaConfig

Part = TypeVar("Part", bound=Config)

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

    @property
    def new_tokens(self) -> tuple[int, int]:
        """The two that the decoder did not know, in the order of the rows that learn for them."""
        return self.eoc_token_id, self.image_token_id

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
    gated = CrossAttentionConfig(every_n_layers=hf["cross_attn_every_n_layers"])
    parts = InfiMMConfig(
        model_type=kind,
        tower=tower,
        resampler=_sizes(ResamplerConfig(width=tower.width), hf, "resampler", where),
        cross_attention=_sizes(gated, hf, "cross_attention", where),
        image_token_id=hf["image_token_id"],
        eoc_token_id=hf["eoc_token_id"],
    )
    return decoder, parts


def infimm_to_hf(decoder: DecoderConfig, parts: InfiMMConfig, dtype: str) -> dict[str, Any]:
    """The config.json of an exported folder: the released keys, so that `infimm_from_hf` reads it back; and two of
    ours, `resampler` and `cross_attention`, where these are not of the released sizes."""
    tower, language = parts.tower, decoder.to_hf(dtype)
    del language["architectures"]
    return {
        "model_type": parts.model_type,
        "cross_attn_every_n_layers": parts.cross_attention.every_n_layers,
        "image_token_id": parts.image_token_id,
        "eoc_token_id": parts.eoc_token_id,
        "tokenizer_type": "LlamaTokenizer",
        "use_cache": True,
        "torch_dtype": dtype,
        "visual": {
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "layers": tower.depth,
            "width": tower.width,
            "head_width": tower.head_width,
            "mlp_ratio": _ratio(tower.mlp_width, tower.width),
            "naiveswiglu": tower.mlp == "swiglu",
            "subln": tower.sub_norm,
            "postnorm": tower.post_norm,
            "rope": tower.rope,
            "pt_hw_seq_len": tower.rope_pretrained_grid,
            "intp_freq": tower.rope,
            "embed_dim": tower.head_dim_out,
        },
        "language": language,
        **_other_sizes("resampler", parts.resampler, ResamplerConfig(width=tower.width), "width"),
        **_other_sizes("cross_attention", parts.cross_attention, CrossAttentionConfig(), "every_n_layers"),
    }


def _other_sizes(key: str, part: Config, released: Config, told_elsewhere: str) -> dict[str, dict[str, Any]]:
    """What a part's settings are, under its key, unless they are the released ones."""
    sizes, usual = part.to_dict(), released.to_dict()
    del sizes[told_elsewhere], usual[told_elsewhere]
    return {} if sizes == usual else {key: sizes}


def _sizes(released: Part, hf: dict[str, Any], key: str, where: str) -> Part:
    """The released sizes, but for those that a folder of ours tells."""
    told = hf.get(key, {})
    if not isinstance(told, dict):
        raise ConfigError(f"{where}: {key}", told, "is no object", "take the folder as it was exported")
    return type(released).from_dict({**released.to_dict(), **told})


def _ratio(inner: int, width: int) -> float:
    """A ratio that readers, who round `width * ratio` down, turn into `inner` again."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)
