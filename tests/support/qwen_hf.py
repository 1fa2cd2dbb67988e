"""transformers' LLaVA-OneVision on the input side: a tiny tokenizer of Qwen2's kind, and the processor around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import BatchFeature, Qwen2Tokenizer
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megavlm.tiles import GridConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
HALF = [0.5, 0.5, 0.5]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = """system user assistant You are a helpful assistant. What is in the picture?
Where is the red square? A red square.
A blue circle.
To the right.

How many shapes are there? There are two

and two

and two

"""


def tiny_tokenizer(media_tokens: bool = True) -> Qwen2Tokenizer:
    """All bytes and a few merges, as Qwen2 splits text; the special tokens behind them."""
    pieces = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    pieces.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    pieces.train_from_iterator([_TEXT] * 2, trainer)
    model = json.loads(pieces.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL[1:] if media_tokens else SPECIAL[1:3],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def write_tokenizer(folder: Path, media_tokens: bool = True) -> Path:
    tiny_tokenizer(media_tokens).save_pretrained(folder)
    return folder


class FrameProcessor:
    """Frames as SigLIP's processor takes them; transformers' own class for videos needs torchvision."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, grid: GridConfig) -> None:
        size = {"height": grid.tile_size, "width": grid.tile_size}
        self.frames = SiglipImageProcessorPil(size=size, image_mean=HALF, image_std=HALF, resample=3)

    def __call__(self, videos: list[np.ndarray], **_: Any) -> BatchFeature:
        made = [self.frames(list(video), return_tensors="pt", input_data_format="channels_last") for video in videos]
        return BatchFeature({"pixel_values_videos": [one["pixel_values"] for one in made]})


def public_processor(grid: GridConfig, tokenizer: Qwen2Tokenizer) -> LlavaOnevisionProcessor:
    """transformers' processor; its constructor would ask for torchvision."""
    size = {"height": grid.tile_size, "width": grid.tile_size}
    processor = object.__new__(LlavaOnevisionProcessor)
    processor.image_processor = LlavaOnevisionImageProcessorPil(
        size=size,
        image_grid_pinpoints=[list(resolution) for resolution in grid.resolutions],
        image_mean=HALF,
        image_std=HALF,
    )
    processor.video_processor = FrameProcessor(grid)
    processor.tokenizer = tokenizer
    processor.chat_template = CHATML
    processor.num_image_tokens = grid.tokens_per_tile
    processor.vision_aspect_ratio = f"anyres_max_{grid.cap_tiles}"
    processor.vision_feature_select_strategy = "full"
    for kind in ("image", "video"):
        setattr(processor, f"{kind}_token", f"<{kind}>")
        setattr(processor, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<{kind}>"))
    return processor
