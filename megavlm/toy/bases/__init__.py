"""The toy bases, weights beside this file, and whole folders made of them that a run can start from.

`tools/make_toy_bases.py` makes the weights; `manifest.json` says how, and what they can do.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megavlm.export.assemble import assemble_infimm
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.towers.eva import EvaTower
from megavlm.model.towers.eva_state_map import eva_state_map
from megavlm.recipes.tiny import DECODER, EVA, INFIMM
from megavlm.toy.tokenizer import NEW_TOKENS, write_tokenizer

WEIGHTS = files("megavlm.toy.bases")
DECODER_FILE, EVA_FILE, MANIFEST = "decoder.safetensors", "eva.safetensors", "manifest.json"


def decoder_shape() -> DecoderConfig:
    """The toy decoder before the tokens that InfiMM adds."""
    return DECODER.replace(vocab_size=DECODER.vocab_size - len(NEW_TOKENS))


def write_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A base as it is kept: bfloat16."""
    save_file({name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, file)


def write_decoder(folder: Path) -> Path:
    """The toy decoder as a folder of its own, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(WEIGHTS / DECODER_FILE) as file:
        weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape = decoder_shape()
    (end,) = shape.eos_token_ids
    tokens = {"bos_token_id": shape.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    (folder / "config.json").write_text(json.dumps(shape.to_hf("float32"), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n")
    write_tokenizer(folder)
    return folder


def base_tower() -> EvaTower:
    """The toy tower alone."""
    tower, table = EvaTower(EVA), eva_state_map(EVA, theirs="")
    with as_file(WEIGHTS / EVA_FILE) as file:
        weights = load_file(file)
    parameters = dict(tower.named_parameters())
    for entry in table.entries:
        (name,) = entry.theirs
        parameters[entry.ours].data.copy_(weights[name].view_as(parameters[entry.ours]))
    return tower.eval()


def infimm_base(folder: Path, seed: int = 1234) -> Path:
    """A toy InfiMM to start from: a tower that sees, a decoder that speaks, a fresh resampler and closed gates."""
    with tempfile.TemporaryDirectory() as place, as_file(WEIGHTS / EVA_FILE) as tower:
        assemble_infimm(
            write_decoder(Path(place)),
            tower,
            INFIMM.tower,
            INFIMM.model_type,
            INFIMM.cross_attention.every_n_layers,
            folder,
            dtype=torch.float32,
            seed=seed,
        )
    return folder
