"""Hugging Face folders of tiny InfiMM models, with the code that we export, and transformers kept off the network."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import transformers.dynamic_module_utils
from tokenizers import Tokenizer, models, trainers
from transformers import AutoModelForCausalLM, LlamaTokenizer

from megavlm.export.infimm_folder import architecture, auto_map, infimm_files, processor_files
from megavlm.model.towers.eva_config import EvaConfig

GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "infimm_zephyr_tiny"
MODEL_TYPES = ("infimm-zephyr", "infimm-vicuna", "infimm-llama")

_TEXT = """<|system|>
You answer briefly.
<|user|>
What is in the picture? Where is the red square, left or right?
<|assistant|>
A red square, and a blue circle to the right of it.
USER: How many shapes are there? ASSISTANT: Two.
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the user's questions. 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz!;"-
"""


@contextmanager
def offline(modules_cache: Path) -> Iterator[None]:
    """No network, and the code of model folders is copied to this place instead of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules_cache))
        patch.syspath_prepend(str(modules_cache))
        _forget_code()
        yield
        _forget_code()


def _forget_code() -> None:
    """Code is imported as a package that remembers the first place it was copied to."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def golden_config(model_type: str = "infimm-zephyr", **changes: Any) -> dict[str, Any]:
    """The golden config.json, as our exporter writes it for this model type."""
    config = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
    kind = "mistral" if model_type == "infimm-zephyr" else "llama"
    config["language"] = {**config["language"], "model_type": kind}
    return {
        **config,
        "model_type": model_type,
        "architectures": [architecture(model_type)],
        "auto_map": auto_map(model_type),
        **changes,
    }


def visual_settings(tower: EvaConfig) -> dict[str, Any]:
    """The tower as a released config.json spells it."""
    return {
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "width": tower.width,
        "layers": tower.depth,
        "head_width": tower.head_width,
        "mlp_ratio": (tower.mlp_width + 0.5) / tower.width,  # int() of the product is the width again
        "embed_dim": tower.head_dim_out,
        "rope": tower.rope,
        "pt_hw_seq_len": tower.rope_pretrained_grid,
        "intp_freq": True,
        "naiveswiglu": tower.mlp == "swiglu",
        "subln": tower.sub_norm,
        "postnorm": tower.post_norm,
    }


def write_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Config, code, processor and tokenizer; no weights."""
    folder.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    others = processor_files(config["model_type"], config["visual"]["image_size"])
    for name, content in {**infimm_files(), **others}.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def golden_folder(folder: Path) -> Path:
    write_folder(folder, golden_config())
    shutil.copy(GOLDEN / "model.safetensors", folder)
    return folder


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)


def tiny_tokenizer() -> LlamaTokenizer:
    """126 pieces as Llama's, `<|endofchunk|>` and `<image>` behind them."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=126, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    pieces.train_from_iterator([_TEXT.replace(" ", "▁")], trainer)
    model = json.loads(pieces.to_str())["model"]
    tokenizer = LlamaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token="</s>",
        extra_special_tokens=["<|endofchunk|>", "<image>"],
        add_bos_token=True,
        model_max_length=2048,
        truncation_side="left",
    )
    assert tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"]) == [126, 127]
    return tokenizer
