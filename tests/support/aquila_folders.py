"""Folders of tiny Aquila-VL models as the public world keeps them, and transformers' processor of a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from qwen_hf import tiny_tokenizer, write_tokenizer
from safetensors.torch import load_file, save_file
from tiny_aquila import GRIDS, save_tiny, tiny_config
from torch import Tensor
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration, processing_utils
from transformers.utils import is_torchvision_available

from megavlm.tiles import GridConfig

IMAGE = len(tiny_tokenizer(media_tokens=False))
VIDEO = IMAGE + 1
ROWS = IMAGE + 30
"""Of the vocabulary: more than there are tokens, as in Qwen2.5."""

_NEXT_NAMES = {
    r"^model\.language_model\.": "model.",
    r"^model\.vision_tower\.(vision_model\.)?": "model.vision_tower.vision_tower.vision_model.",
    r"^model\.multi_modal_projector\.linear_1\.": "model.mm_projector.0.",
    r"^model\.multi_modal_projector\.linear_2\.": "model.mm_projector.2.",
}
"""From the names of transformers' modules to those of LLaVA-NeXT."""


def tiny_model(folder: Path, tied: bool, grid: GridConfig = GRIDS["2b"]) -> LlavaOnevisionForConditionalGeneration:
    """A model in bfloat16 in the folder, with a vocabulary that has room for the tokenizer."""
    config = tiny_config(grid, tied=tied, text={"vocab_size": ROWS, "eos_token_id": IMAGE - 1})
    config.image_token_index, config.video_token_index = IMAGE, VIDEO
    config.dtype = torch.bfloat16
    model = save_tiny(folder, config, seed=int(tied)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


def next_tensors(model: LlavaOnevisionForConditionalGeneration) -> dict[str, Tensor]:
    """The model's tensors under LLaVA-NeXT's names, the output layer among them also where it is the embedding."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for runtime, theirs in _NEXT_NAMES.items():
            name, found = re.subn(runtime, theirs, name)
            if found:
                break
        tensors[name] = tensor.clone()
    return tensors


def next_config(model: LlavaOnevisionForConditionalGeneration, grid: GridConfig | None = GRIDS["2b"]) -> dict[str, Any]:
    """config.json as LLaVA-NeXT writes it, with the number for images that its own code never reads."""
    text = model.config.text_config
    tiling = {
        "mm_patch_merge_type": "spatial_unpad" if grid else "flat",
        "image_aspect_ratio": f"anyres_max_{grid.cap_tiles}" if grid else "square",
        "image_grid_pinpoints": [[width, height] for height, width in grid.resolutions] if grid else None,
    }
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        **{key: value for key, value in text.to_dict().items() if key not in ("architectures", "model_type")},
        "tie_word_embeddings": model.config.tie_word_embeddings,
        "image_token_index": 151646,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "google/some-siglip",
        "megavlm_vision_config": model.config.vision_config.to_dict(),
        **tiling,
    }


def write_next_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A folder in LLaVA-NeXT's layout, its tokenizer without the tags, and what old conversions leave in it."""
    folder.mkdir()
    leftover = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | leftover, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, media_tokens=False)
    return folder


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, formats and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def processor_of(folder: Path) -> Any:
    """What `AutoProcessor` makes of a folder. Where there is no torchvision, which it wants for the video half, that
    half is left out.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        if not is_torchvision_available():
            names = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING._MAPPING_NAMES
            patch.setitem(names, "video_processor", (__name__, "NoVideos"))
            patch.setattr(processing_utils.ProcessorMixin, "check_argument_for_proper_class", NoVideos.accept)
        return AutoProcessor.from_pretrained(folder)


class NoVideos:
    """Stands where `AutoVideoProcessor` would raise."""

    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> None:
        return None

    @staticmethod
    def accept(*_: Any) -> None:
        return None
