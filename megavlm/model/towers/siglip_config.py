"""The shape of a SigLIP vision tower, the published tower by name, and how a config.json spells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megavlm.config import Config, require
from megavlm.errors import ConfigError

# our field -> the key of transformers' SiglipVisionConfig
_HF_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "norm_epsilon": "layer_norm_eps",
}
# what the tower is built for; a config may leave these out, for they are the defaults of transformers as well
_HF_FIXED = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "num_channels": 3,
    "attention_dropout": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(Config):
    """A SigLIP vision tower, as LLaVA-OneVision uses it: without its pooling head, the last norm unused."""

    image_size: int = 384
    """Pixels along each side of an image. What a last incomplete patch would hold is not seen: 6 of 384 pixels."""
    patch_size: int = 14
    """Pixels along each side of a patch."""
    width: int = 1152
    """Width of the residual stream."""
    depth: int = 26
    """Blocks that are used: one less than the published model has."""
    heads: int = 16
    """Attention heads."""
    mlp_width: int = 4304
    """Inner width of the MLP."""
    norm_epsilon: float = 1e-6
    """Epsilon of all LayerNorms."""

    def check(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "heads", "mlp_width"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1", "use a positive number")
        require(
            self.image_size >= self.patch_size,
            self,
            "image_size",
            f"holds no patch of {self.patch_size} pixels",
            f"use {self.patch_size} or more",
        )
        require(
            self.width % self.heads == 0, self, "heads", f"does not divide width {self.width}", "use a divisor of width"
        )
        require(self.norm_epsilon > 0, self, "norm_epsilon", "must be positive", "use 1e-6")

    @property
    def grid(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of an image: one a patch."""
        return self.grid**2

    @property
    def patch_values(self) -> int:
        """Numbers in a patch row."""
        return 3 * self.patch_size**2

    @classmethod
    def from_hf(
        cls, vision: dict[str, Any], where: str = "config.json: vision_config", unused: int = 0
    ) -> SiglipConfig:
        """Read a vision config of transformers, less its last `unused` blocks; what this tower cannot compute is
        refused. A size that is missing has a default in transformers, but that of another model, so all are asked.
        """
        values: dict[str, Any] = {}
        for ours, key in _HF_KEYS.items():
            if key != "layer_norm_eps" and type(vision.get(key)) is not int:
                raise ConfigError(
                    f"{where}.{key}", vision.get(key), "must be a whole number", "take a complete config.json"
                )
            if key in vision:
                values[ours] = vision[key]
        for key, known in _HF_FIXED.items():
            if vision.get(key, known) != known:
                raise ConfigError(
                    f"{where}.{key}", vision[key], f"only {known!r} is supported", "take a tower of that kind"
                )
        return cls(**{**values, "depth": values["depth"] - unused})

    def to_hf(self) -> dict[str, Any]:
        """The vision config of transformers that `from_hf` reads back."""
        return {
            **_HF_FIXED,
            **{key: getattr(self, ours) for ours, key in _HF_KEYS.items()},
            "vision_use_head": False,
        }


SIGLIP_SO400M = SiglipConfig()
"""google/siglip-so400m-patch14-384 less its last block: the tower of LLaVA-OneVision and Aquila-VL."""
