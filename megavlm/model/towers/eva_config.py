"""The shape of an EVA vision tower, the published towers by name, and how a released config.json spells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megavlm.config import Config, require
from megavlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaConfig(Config):
    """An EVA-CLIP vision tower."""

    image_size: int
    """Pixels along each side of an image."""
    patch_size: int
    """Pixels along each side of a patch."""
    width: int
    """Width of the residual stream."""
    depth: int
    """Transformer blocks."""
    head_width: int
    """Width of an attention head."""
    mlp_width: int
    """Inner width of the MLP."""
    mlp: Literal["swiglu", "gelu"]
    """The MLP: gated by SiLU, or plain with the exact (erf) GELU."""
    sub_norm: bool
    """Whether a LayerNorm stands before the last projection of attention and MLP, too (sub-LN)."""
    rope: bool
    """Whether queries and keys carry two-dimensional rotary positions, beside the learned ones."""
    rope_pretrained_grid: int = 16
    """Patches along each side when the rotary frequencies were trained: positions are rescaled to that grid."""
    post_norm: bool
    """Whether the norms stand behind attention and MLP, within the residual branch, instead of before them."""
    norm_epsilon: float = 1e-6
    """Epsilon of all LayerNorms."""
    head_dim_out: int
    """Width of CLIP's head: it stands in every checkpoint, and nothing here uses it."""

    def check(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "head_width", "mlp_width", "head_dim_out"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1", "use a positive number")
        require(
            self.image_size % self.patch_size == 0,
            self,
            "image_size",
            f"is no multiple of patch_size {self.patch_size}",
            f"use {max(self.image_size // self.patch_size, 1) * self.patch_size}",
        )
        require(
            self.width % self.head_width == 0,
            self,
            "head_width",
            f"does not divide width {self.width}",
            "use a divisor of width",
        )
        if self.rope:
            require(
                self.head_width % 4 == 0,
                self,
                "head_width",
                "rotary positions turn pairs of channels by row and by column",
                "use a multiple of 4",
            )
            require(self.rope_pretrained_grid >= 1, self, "rope_pretrained_grid", "must be at least 1", "use 16")

    @property
    def grid(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Tokens of an image: its patches behind the class token."""
        return 1 + self.patches

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def patch_values(self) -> int:
        """Numbers in a patch row."""
        return 3 * self.patch_size**2

    @classmethod
    def from_hf(cls, visual: dict[str, Any], where: str = "config.json: visual") -> EvaConfig:
        """Read the section `visual` of a released config.json; what this tower cannot compute is refused."""
        for key in ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "embed_dim"):
            if type(visual.get(key)) not in (int, float):
                raise ConfigError(f"{where}.{key}", visual.get(key), "must be a number", "take a complete config.json")
        rope = visual.get("rope", False)
        for key, found, known in (
            ("qkv_bias", visual.get("qkv_bias", True), True),
            ("ls_init_value", visual.get("ls_init_value"), None),
            ("global_average_pool", visual.get("global_average_pool", False), False),
            ("patch_dropout", visual.get("patch_dropout", 0), 0),
            ("intp_freq", visual.get("intp_freq", False) or not rope, True),
        ):
            if found != known:
                raise ConfigError(f"{where}.{key}", found, f"only {known!r} is supported", "take a tower of that kind")
        return cls(
            image_size=visual["image_size"],
            patch_size=visual["patch_size"],
            width=visual["width"],
            depth=visual["layers"],
            head_width=visual["head_width"],
            mlp_width=int(visual["width"] * visual["mlp_ratio"]),
            mlp="swiglu" if visual.get("naiveswiglu", False) else "gelu",
            sub_norm=visual.get("subln", False),
            rope=rope,
            rope_pretrained_grid=visual.get("pt_hw_seq_len", 16),
            post_norm=visual.get("postnorm", False),
            head_dim_out=visual["embed_dim"],
        )


EVA_TOWERS = {
    "EVA02-CLIP-L/14-336": EvaConfig(
        image_size=336,
        patch_size=14,
        width=1024,
        depth=24,
        head_width=64,
        mlp_width=2730,
        mlp="swiglu",
        sub_norm=True,
        rope=True,
        post_norm=False,
        head_dim_out=768,
    ),
    "EVA01-CLIP-g/14-224": EvaConfig(
        image_size=224,
        patch_size=14,
        width=1408,
        depth=40,
        head_width=88,
        mlp_width=6144,
        mlp="gelu",
        sub_norm=False,
        rope=False,
        post_norm=False,
        head_dim_out=1024,
    ),
    "EVA02-CLIP-E/14-224": EvaConfig(
        image_size=224,
        patch_size=14,
        width=1792,
        depth=64,
        head_width=112,
        mlp_width=15360,
        mlp="gelu",
        sub_norm=False,
        rope=False,
        post_norm=True,
        head_dim_out=1024,
    ),
}
"""The published towers of the InfiMM models, under the names of their model cards."""


def eva_tower(name: str) -> EvaConfig:
    """The published tower of this name."""
    if name not in EVA_TOWERS:
        raise ConfigError("vision tower", name, "is not known", f"use one of {', '.join(EVA_TOWERS)}")
    return EVA_TOWERS[name]
