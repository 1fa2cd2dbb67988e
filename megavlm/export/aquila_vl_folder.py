"""What an exported Aquila-VL folder carries beside its weights, in either public layout.

transformers' layout brings a processor: its files under the names that versions from 4.45 on look for. LLaVA-NeXT's
own code has its processor and its chat format built in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from megavlm.errors import ConfigError
from megavlm.export.tagged_tokenizer import TAGS, TaggedTokenizer
from megavlm.log import get_logger
from megavlm.model.aquila_vl.config import AquilaVLConfig, llava_next_config, transformers_config
from megavlm.model.aquila_vl.state_map import LLAVA_NEXT, TRANSFORMERS, Spelling
from megavlm.model.decoder.config import DecoderConfig

logger = get_logger(__name__)

Layout = Literal["transformers", "llava-next"]
SPELLINGS: Mapping[Layout, Spelling] = {"transformers": TRANSFORMERS, "llava-next": LLAVA_NEXT}
"""How each layout names its tensors."""

CHAT_TEMPLATE = (files("megavlm.export") / "aquila_vl_files" / "chat_template.jinja").read_text(encoding="utf-8")

_HALF = [0.5, 0.5, 0.5]
_BICUBIC = 3
_PROCESSOR = {"processor_class": "LlavaOnevisionProcessor"}
_GENERATION = "generation_config.json"


def aquila_vl_family_files(
    decoder: DecoderConfig,
    parts: AquilaVLConfig,
    dtype: str,
    layout: Layout,
    tokenizer: TaggedTokenizer | None,
    source: str | Path | None,
) -> dict[str, bytes]:
    """All that the folder holds beside weights; `source` is the folder whose settings of generation go along."""
    config = (transformers_config if layout == "transformers" else llava_next_config)(decoder, parts, dtype)
    found = {"config.json": _json(config), _GENERATION: _generation(decoder, source)}
    if layout == "transformers":
        _warn_of_single_tiles(parts)
        found |= _processor_files(config, parts)
    if tokenizer is not None:
        _check_tokens(tokenizer, parts)
        found |= tokenizer.files | _chat_files(tokenizer)
    return found


def _processor_files(config: Mapping[str, Any], parts: AquilaVLConfig) -> dict[str, bytes]:
    """The files from which `AutoProcessor` (with the tokenizer's own files) makes the processor."""
    size = {"height": parts.grid.tile_size, "width": parts.grid.tile_size}
    image, video = TAGS
    pixels = {
        **_PROCESSOR,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _HALF,
        "image_std": _HALF,
    }
    processor = {
        **_PROCESSOR,
        "num_image_tokens": parts.grid.tokens_per_tile,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "vision_aspect_ratio": config["vision_aspect_ratio"],
        "image_token": image,
        "video_token": video,
    }
    images = {
        **pixels,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "do_pad": True,
    }
    return {
        "processor_config.json": _json(processor),
        # Before 4.52 it is the video processor's as well.
        "preprocessor_config.json": _json(images),
        "video_preprocessor_config.json": _json(
            {**pixels, "video_processor_type": "LlavaOnevisionVideoProcessor", "do_sample_frames": False}
        ),
        # Where processors of versions before 4.49 look for it.
        "chat_template.json": _json({"chat_template": CHAT_TEMPLATE}),
    }


def _chat_files(tokenizer: TaggedTokenizer) -> dict[str, bytes]:
    """The chat format: a file of its own, and where older tokenizers look for it."""
    config = json.loads(tokenizer.files["tokenizer_config.json"])
    return {
        "chat_template.jinja": CHAT_TEMPLATE.encode(),
        "tokenizer_config.json": _json({**config, "chat_template": CHAT_TEMPLATE}),
    }


def _generation(decoder: DecoderConfig, source: str | Path | None) -> bytes:
    """The settings of the folder that the model comes from; else how a text begins and ends."""
    if source is not None and (Path(source) / _GENERATION).is_file():
        return (Path(source) / _GENERATION).read_bytes()
    ids = {key: decoder.to_hf("bfloat16")[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return _json({key: token for key, token in ids.items() if token is not None})


def _check_tokens(tokenizer: TaggedTokenizer, parts: AquilaVLConfig) -> None:
    for tag, found, said in zip(TAGS, tokenizer.tokens, (parts.image_token_id, parts.video_token_id), strict=True):
        if found != said:
            raise ConfigError(
                f"token of {tag}", said, f"the tokenizer says {found}", "use the tokenizer that the model was built on"
            )


def _warn_of_single_tiles(parts: AquilaVLConfig) -> None:
    if parts.grid.tiling == "single":
        tile = parts.grid.tokens_per_tile
        grid = tile + parts.grid.tokens_per_side
        logger.warning(
            "the model was trained on single tiles of %d tokens; transformers treats each as a base tile and a grid of "
            "one with newlines, %d tokens",
            tile,
            tile + grid,
        )


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
