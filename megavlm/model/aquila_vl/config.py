"""What Aquila-VL adds to its decoder, and how the two public layouts of config.json spell it.

transformers' LlavaOnevision has a section for each part. LLaVA-NeXT's own layout (`llava_qwen`) is the decoder's config
with the other parts between; it names the tower instead of describing it, so what it has no words for is written under
keys of ours, which its readers pass over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from megavlm.config import Config, require
from megavlm.errors import ConfigError
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.towers.siglip_config import SIGLIP_SO400M, SiglipConfig
from megavlm.tiles import GridConfig

TRANSFORMERS = "llava_onevision"
LLAVA_NEXT = {"llava_qwen": "qwen2", "llava_llama": "llama", "llava_mistral": "mistral"}
"""LLaVA-NeXT's model types, and the decoder behind each."""

_SO400M = "siglip-so400m-patch14-384"
_MOST_PER_SIDE = 100
"""Tiles: what says more is no model's config.json, and would take long to write out."""
_TILING, _TOWER = "megavlm_tiling", "megavlm_vision_config"


@dataclass(frozen=True, kw_only=True)
class AquilaVLConfig(Config):
    """The parts around the decoder."""

    tower: SiglipConfig = SIGLIP_SO400M
    """The vision tower."""
    grid: GridConfig = field(default_factory=GridConfig)
    """How images become tiles and tokens: a matter of the training stage."""
    image_token_id: int
    """The token whose places the tokens of images take."""
    video_token_id: int
    """The same for videos."""

    def check(self) -> None:
        for name, ours, theirs in (
            ("grid.tile_size", self.grid.tile_size, self.tower.image_size),
            ("grid.patch_size", self.grid.patch_size, self.tower.patch_size),
        ):
            if ours != theirs:
                raise ConfigError(f"AquilaVLConfig.{name}", ours, f"the tower takes {theirs}", f"use {theirs}")
        for name in ("image_token_id", "video_token_id"):
            require(getattr(self, name) >= 0, self, name, "is no token", "take it from the tokenizer")
        require(
            self.image_token_id != self.video_token_id,
            self,
            "video_token_id",
            "is the image's token, too",
            "take both from the tokenizer",
        )

    @property
    def placeholders(self) -> tuple[int, int]:
        """The tokens of images and of videos."""
        return self.image_token_id, self.video_token_id


def is_aquila_vl(hf: dict[str, Any]) -> bool:
    """Whether a config.json is of this family, in either layout (a re-saved copy may call itself its decoder)."""
    return hf.get("model_type") == TRANSFORMERS or is_llava_next(hf)


def is_llava_next(hf: dict[str, Any]) -> bool:
    """Whether a config.json is of LLaVA-NeXT's layout."""
    return str(hf.get("model_type")) in LLAVA_NEXT or "mm_projector_type" in hf


def aquila_vl_from_hf(
    hf: dict[str, Any], where: str = "config.json", tokens: tuple[int | None, int | None] = (None, None)
) -> tuple[DecoderConfig, AquilaVLConfig]:
    """The decoder and the parts around it.

    `tokens`: those of `<image>` and `<video>` in the folder's tokenizer, which must be what transformers' layout says.
    In LLaVA-NeXT's the tokenizer decides: its own code never looks at the numbers, so a wrong one stays unnoticed.
    """
    read = _from_llava_next if is_llava_next(hf) else _from_transformers
    decoder, tower, grid = read(hf, where)
    image, video = (
        _token(None if is_llava_next(hf) and found is not None else hf.get(key), found, tag, where)
        for key, found, tag in zip(
            ("image_token_index", "video_token_index"), tokens, ("<image>", "<video>"), strict=True
        )
    )
    return decoder, AquilaVLConfig(tower=tower, grid=grid, image_token_id=image, video_token_id=video)


def _token(said: Any, found: int | None, tag: str, where: str) -> int:
    if said is None and found is None:
        raise ConfigError(
            f"{where}: token of {tag}",
            None,
            "neither the config nor the tokenizer has one",
            "convert the folder with `megavlm import-hf`, which adds it",
        )
    if said is not None and found is not None and said != found:
        raise ConfigError(
            f"{where}: token of {tag}",
            said,
            f"the tokenizer says {found}",
            "take both from one folder, or mend the config",
        )
    token = found if said is None else said
    if type(token) is not int:
        raise ConfigError(f"{where}: token of {tag}", token, "is no token", "write the number that the tokenizer gives")
    return token


def _from_transformers(hf: dict[str, Any], where: str) -> tuple[DecoderConfig, SiglipConfig, GridConfig]:
    for key in ("vision_config", "text_config"):
        if not isinstance(hf.get(key), dict):
            raise ConfigError(f"{where}: {key}", hf.get(key), "is no section", "take a complete config.json")
    for key, known in (
        ("vision_feature_layer", -1),
        ("vision_feature_select_strategy", "full"),
        ("projector_hidden_act", "gelu"),
        ("multimodal_projector_bias", True),
    ):
        _refuse_other(hf, key, known, where)
    # transformers ties by the outer key, whatever the section says.
    text = {**hf["text_config"], "tie_word_embeddings": hf.get("tie_word_embeddings", False)}
    decoder = DecoderConfig.from_hf(text, f"{where}: text_config")
    tower = SiglipConfig.from_hf(hf["vision_config"], f"{where}: vision_config")
    pinpoints, aspect = hf.get("image_grid_pinpoints"), hf.get("vision_aspect_ratio", "anyres_max_9")
    if hf.get(_TILING) == "single":
        return decoder, tower, _grid(tower, tiling="single")
    side = _tiles_per_side(_pairs(pinpoints, f"{where}: image_grid_pinpoints"), tower, where)
    return (
        decoder,
        tower,
        _grid(tower, max_tiles_per_side=side, cap_tiles=_cap(aspect, f"{where}: vision_aspect_ratio")),
    )


def _from_llava_next(hf: dict[str, Any], where: str) -> tuple[DecoderConfig, SiglipConfig, GridConfig]:
    for key, known in (
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_use_im_start_end", False),
        ("mm_use_im_patch_token", False),
    ):
        _refuse_other(hf, key, known, where)
    kind = LLAVA_NEXT.get(str(hf.get("model_type")), hf.get("model_type"))
    decoder = DecoderConfig.from_hf({**hf, "model_type": kind}, where)
    name = str(hf.get("mm_vision_tower", ""))
    if _TOWER in hf:
        tower = SiglipConfig.from_hf(hf[_TOWER], f"{where}: {_TOWER}")
    elif name.rstrip("/").endswith(_SO400M):
        tower = SIGLIP_SO400M
    else:
        raise ConfigError(
            f"{where}: mm_vision_tower",
            name,
            "is not known, and this layout does not describe it",
            f"take a model over {_SO400M}, or transformers' layout",
        )
    merge, aspect = hf.get("mm_patch_merge_type", "flat"), str(hf.get("image_aspect_ratio", "square"))
    if merge == "flat" and not aspect.startswith("anyres"):
        return decoder, tower, _grid(tower, tiling="single")
    if merge != "spatial_unpad":
        raise ConfigError(
            f"{where}: mm_patch_merge_type",
            merge,
            f"is not supported with image_aspect_ratio {aspect}",
            "use spatial_unpad",
        )
    pairs = _pairs(_expanded(hf.get("image_grid_pinpoints"), tower.image_size), f"{where}: image_grid_pinpoints")
    side = _tiles_per_side(pairs, tower, where)
    return decoder, tower, _grid(tower, max_tiles_per_side=side, cap_tiles=_cap(aspect, f"{where}: image_aspect_ratio"))


def _refuse_other(hf: dict[str, Any], key: str, known: object, where: str) -> None:
    if hf.get(key, known) != known:
        raise ConfigError(f"{where}: {key}", hf[key], f"only {known!r} is supported", "take a model of that kind")


def _grid(tower: SiglipConfig, **settings: Any) -> GridConfig:
    return GridConfig(tile_size=tower.image_size, patch_size=tower.patch_size, **settings)


def _cap(aspect: Any, where: str) -> int:
    found = re.fullmatch(r"anyres_max_([0-9]{1,9})", str(aspect))
    if found is None:
        raise ConfigError(where, aspect, "is no tiling with a cap", "use for example anyres_max_9")
    return int(found.group(1))


def _expanded(pinpoints: Any, tile_size: int) -> Any:
    """LLaVA-NeXT may write the candidates as "(1x1),...,(6x6)"."""
    found = re.fullmatch(r"\s*\(1x1\),\.\.\.,\(([0-9]{1,9})x([0-9]{1,9})\)\s*", str(pinpoints))
    if found is None:
        return pinpoints
    columns, rows = (min(int(tiles), _MOST_PER_SIDE + 1) for tiles in found.groups())
    return [[i * tile_size, j * tile_size] for i in range(1, columns + 1) for j in range(1, rows + 1)]


def _pairs(pinpoints: Any, where: str) -> set[tuple[int, int]]:
    try:
        pairs = {(first, second) for first, second in pinpoints}
    except (TypeError, ValueError):
        pairs = set()
    if not pairs or any(type(side) is not int for pair in pairs for side in pair):
        raise ConfigError(where, pinpoints, "is no list of pairs of pixels", "take a complete config.json")
    return pairs


def _tiles_per_side(pairs: set[tuple[int, int]], tower: SiglipConfig, where: str) -> int:
    """The n of candidates that are all grids from (1x1) to (n x n) tiles: all that the tiling knows."""
    side = max(first for first, _ in pairs) // tower.image_size
    is_whole = 1 <= side <= _MOST_PER_SIDE and len(pairs) == side**2
    if not is_whole or pairs != set(_grid(tower, max_tiles_per_side=side, cap_tiles=side).resolutions):
        raise ConfigError(
            f"{where}: image_grid_pinpoints",
            sorted(pairs),
            f"is not every grid from (1x1) to some (n x n) tiles of {tower.image_size} pixels",
            "take a model with such a grid",
        )
    return side


def transformers_config(decoder: DecoderConfig, parts: AquilaVLConfig, dtype: str) -> dict[str, Any]:
    """config.json for transformers' LlavaOnevisionForConditionalGeneration."""
    text = decoder.to_hf(dtype)
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": TRANSFORMERS,
        "image_token_index": parts.image_token_id,
        "video_token_index": parts.video_token_id,
        "vision_config": parts.tower.to_hf(),
        "text_config": text,
        "tie_word_embeddings": decoder.tied_embeddings,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        **_transformers_tiling(parts.grid),
        "torch_dtype": dtype,
    }


def _transformers_tiling(grid: GridConfig) -> dict[str, Any]:
    if grid.tiling == "single":
        # The nearest that transformers has: it sees a base tile and one more, with newlines.
        return {
            "image_grid_pinpoints": [[grid.tile_size, grid.tile_size]],
            "vision_aspect_ratio": "anyres_max_1",
            _TILING: "single",
        }
    return {
        "image_grid_pinpoints": [list(resolution) for resolution in grid.resolutions],
        "vision_aspect_ratio": f"anyres_max_{grid.cap_tiles}",
    }


def llava_next_config(decoder: DecoderConfig, parts: AquilaVLConfig, dtype: str) -> dict[str, Any]:
    """config.json in LLaVA-NeXT's own layout."""
    kind = next(ours for ours, family in LLAVA_NEXT.items() if family == decoder.family)
    single = parts.grid.tiling == "single"
    tower = {} if parts.tower == SIGLIP_SO400M else {_TOWER: parts.tower.to_hf()}
    return {
        **decoder.to_hf(dtype),
        "architectures": [f"Llava{kind.removeprefix('llava_').capitalize()}ForCausalLM"],
        "model_type": kind,
        "use_mm_proj": True,
        "mm_vision_tower": f"google/{_SO400M}",
        "mm_hidden_size": parts.tower.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat" if single else "spatial_unpad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square" if single else f"anyres_max_{parts.grid.cap_tiles}",
        "image_grid_pinpoints": [[width, height] for height, width in parts.grid.resolutions] if not single else None,
        "image_crop_resolution": None,
        "image_split_resolution": None,
        "image_token_index": parts.image_token_id,
        "video_token_index": parts.video_token_id,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": decoder.max_position_embeddings,
        **tower,
    }
