"""config.json in and out: what is kept, and what is refused instead of ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import check_folder
from megavlm.errors import ConfigError, WeightsError
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.state_map import decoder_state_map

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
}


def test_what_generation_needs_survives() -> None:
    decoder = DecoderConfig.from_hf(QWEN)
    again = decoder.to_hf("float32")
    assert (again["bos_token_id"], again["eos_token_id"], again["pad_token_id"]) == (3, [4, 5], None)
    assert DecoderConfig.from_hf(again) == decoder
    assert DecoderConfig.from_hf({**QWEN, "eos_token_id": 4}).to_hf("float32")["eos_token_id"] == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, r"model_type = 'gpt2': is no decoder known here; use one of llama, mistral, qwen2"),
        ({"num_attention_heads": 0}, r"num_attention_heads = 0: is no number of at least 1"),
        ({"hidden_size": None}, r"hidden_size = None: is missing"),
        ({"rope_theta": 10000.5}, r"rope_theta = 10000.5: only whole numbers"),
        ({"rope_theta": "10000"}, r"rope_theta = '10000': only whole numbers"),
        ({"rope_theta": None}, r"rope_theta = None: only whole numbers"),
        ({"rope_theta": float("inf")}, r"rope_theta = inf: only whole numbers"),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": [1]}, r"rope_parameters = \[1\]: is no mapping"),
        ({"rope_parameters": "linear"}, r"rope_parameters = 'linear': is no mapping"),
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling = 'yarn': only 'default' is supported"),
        ({"use_sliding_window": True}, r"use_sliding_window = True: windowed attention is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu': only 'silu' is supported"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_hf({**QWEN, **changes})


@pytest.mark.parametrize("differs", [False, True])
def test_a_stored_head_must_be_the_tied_one(differs: bool, tmp_path: Path) -> None:
    state_map = decoder_state_map(DecoderConfig.from_hf(QWEN))
    weights = {name: torch.randn(shape) for name, shape in state_map.folder_shapes().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + float(differs)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with HFFolder.open(tmp_path) as folder:
        if not differs:
            check_folder(folder, state_map, "folder")
            return
        with pytest.raises(WeightsError, match=r"'lm_head.weight': differs from model.embed_tokens.weight"):
            check_folder(folder, state_map, "folder")
