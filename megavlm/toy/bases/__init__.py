"""The toy bases, weights beside this file, and whole folders made of them that a run can start from.

`tools/make_toy_bases.py` makes the weights; `manifest.json` says how, and what they can do.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megavlm.checkpoint.fresh import FreshWeights
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import WeightSource
from megavlm.checkpoint.sources import ComposedWeights, GrownWeights
from megavlm.export.aquila_vl_folder import aquila_vl_family_files
from megavlm.export.assemble import assemble_infimm, write_folder
from megavlm.export.hf_export import tokenizer_files
from megavlm.export.infimm_folder import infimm_family_files
from megavlm.export.tagged_tokenizer import tagged_tokenizer
from megavlm.model.aquila_vl.state_map import TRANSFORMERS, aquila_vl_state_map
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.infimm.state_map import infimm_state_map
from megavlm.model.towers.eva import EvaTower
from megavlm.model.towers.eva_config import EvaConfig
from megavlm.model.towers.eva_state_map import eva_state_map
from megavlm.model.towers.siglip import SiglipTower
from megavlm.model.towers.siglip_config import SiglipConfig
from megavlm.model.towers.siglip_state_map import siglip_state_map
from megavlm.recipes.tiny import AQUILA_VL, DECODER, EVA, INFIMM, QWEN
from megavlm.toy.projector_start import speaking_projector
from megavlm.toy.resampler_start import FIRST_ATTENTION, looking_latents
from megavlm.toy.tokenizer import NEW_TOKENS, write_tokenizer

WEIGHTS = files("megavlm.toy.bases")
DECODER_FILE, EVA_FILE, PLACES_FILE = "decoder.safetensors", "eva.safetensors", "places.safetensors"
SIGLIP_FILE, PROJECTOR_FILE = "siglip.safetensors", "projector.safetensors"
MANIFEST = "manifest.json"
OPEN_GATES = {".attn_gate": 1.0, ".ff_gate": 0.5}
"""Where gates start. From 0, as in the real models, those of the attention come to 0.03 in 500 steps."""

SILENT = (".0.to_out.weight", ".1.3.weight", ".attn.to_out.weight", ".ff.3.weight")
"""Last projections of the resampler's layers and of the gated blocks: these start from zero."""

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def decoder_shape() -> DecoderConfig:
    """The toy decoder before the tokens that InfiMM adds."""
    return DECODER.replace(vocab_size=DECODER.vocab_size - len(NEW_TOKENS))


def write_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A base as it is kept: bfloat16."""
    save_file({name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, file)


def write_decoder(folder: Path, *, of_chatml: bool = False) -> Path:
    """The toy decoder as a folder of its own, with its tokenizer, which may be that of chatml."""
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(WEIGHTS / DECODER_FILE) as file:
        weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape = decoder_shape()
    (end,) = shape.eos_token_ids
    tokens = {"bos_token_id": shape.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    (folder / "config.json").write_text(json.dumps(shape.to_hf("float32"), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n")
    write_tokenizer(folder, of_chatml=of_chatml)
    return folder


def base_tower(config: EvaConfig | SiglipConfig = EVA) -> EvaTower | SiglipTower:
    """The toy tower of this shape alone."""
    tower: EvaTower | SiglipTower
    if isinstance(config, EvaConfig):
        tower, table, kept = EvaTower(config), eva_state_map(config, theirs=""), EVA_FILE
    else:
        tower, table, kept = SiglipTower(config), siglip_state_map(config, theirs=""), SIGLIP_FILE
    with as_file(WEIGHTS / kept) as file:
        weights = load_file(file)
    parameters = dict(tower.named_parameters())
    for entry in table.entries:
        parameter = parameters[entry.ours]
        parameter.data.copy_(torch.cat([weights[name] for name in entry.theirs]).view_as(parameter))
    return tower.eval()


def aquila_vl_base(folder: Path, seed: int = 1234) -> Path:
    """A toy Aquila-VL to start from: a tower that sees, a decoder that speaks, and between them fresh weights, but that
    some of the projector's channels already tell the decoder what a patch shows."""
    whole, prefix = aquila_vl_state_map(QWEN, AQUILA_VL), TRANSFORMERS.tower
    with tempfile.TemporaryDirectory() as place, as_file(WEIGHTS / SIGLIP_FILE) as tower:
        language = write_decoder(Path(place), of_chatml=True)
        with HFFolder.open(language) as text, HFFolder.open_file(tower) as eyes:
            words = GrownWeights(text, _VOCABULARY, QWEN.vocab_size)
            fresh = FreshWeights(whole, seed, QWEN.init_method_std)
            source = ComposedWeights(
                fresh,
                {
                    **{TRANSFORMERS.name(name): (words, name) for name in text.names()},
                    **{prefix + name: (eyes, name) for name in eyes.names()},
                },
            )
            replaced = _Replaced(source, _projector(fresh))
            tokenizer = tagged_tokenizer(language)
            extra = aquila_vl_family_files(QWEN, AQUILA_VL, "float32", "transformers", tokenizer, None)
            write_folder(replaced, whole, folder, torch.float32, extra)
    return folder


def _projector(fresh: FreshWeights) -> dict[str, Tensor]:
    prefix = "multi_modal_projector."
    names = [name.removeprefix(prefix) for name in fresh.names() if name.startswith(prefix)]
    with as_file(WEIGHTS / PROJECTOR_FILE) as file:
        kept = {name: tensor.float() for name, tensor in load_file(file).items()}
    made = speaking_projector({name: fresh.read(prefix + name) for name in names}, kept["readings"], kept["meanings"])
    return {prefix + name: tensor for name, tensor in made.items()}


def infimm_base(folder: Path, seed: int = 1234) -> Path:
    """A toy InfiMM to start from: a tower that sees, a decoder that speaks, and between them fresh weights, but that
    the gates are open and that the resampler's first attention has each latent hand on one patch."""
    with tempfile.TemporaryDirectory() as place, as_file(WEIGHTS / EVA_FILE) as tower:
        language, plain = write_decoder(Path(place) / "decoder"), Path(place) / "plain"
        assemble_infimm(
            *(language, tower, INFIMM.tower, INFIMM.model_type, INFIMM.cross_attention, plain),
            dtype=torch.float32,
            seed=seed,
            resampler=INFIMM.resampler,
        )
        with HFFolder.open(plain) as source:
            extra = {**tokenizer_files(language), **infimm_family_files(DECODER, INFIMM, "float32")}
            whole = infimm_state_map(DECODER, INFIMM)
            write_folder(_Opened(source, seed), whole, folder, torch.float32, extra)
    return folder


FAMILY_BASES: dict[str, Callable[[Path, int], Path]] = {"infimm": infimm_base, "aquila-vl": aquila_vl_base}
"""What writes the folder that a toy of each family starts from, out of a seed."""


class _Replaced:
    """A source some of whose tensors are others."""

    def __init__(self, source: WeightSource, others: Mapping[str, Tensor]) -> None:
        self._source, self._others = source, others

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> Tensor:
        return self._others[name] if name in self._others else self._source.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[:, start:stop]


class _Opened(_Replaced):
    """The weights of a folder with the resampler's beginning replaced and its gates open; what stands behind the
    first attention adds nothing yet, so that neither its patches nor the decoder's words drown in noise."""

    def __init__(self, source: HFFolder, seed: int) -> None:
        with as_file(WEIGHTS / PLACES_FILE) as file:
            places = load_file(file)["places"].float()
        prefix = "model.perceiver."
        fresh = {name: source.read(prefix + name) for name in FIRST_ATTENTION}
        set_up = looking_latents(fresh, places, INFIMM.resampler, seed)
        others = {prefix + name: tensor for name, tensor in set_up.items()}
        for ending, gate in OPEN_GATES.items():
            others |= {name: torch.full((1,), gate) for name in source.names() if name.endswith(ending)}
        silent = (name for name in source.names() if name.endswith(SILENT) and name not in others)
        others |= {name: torch.zeros(source.shape(name)) for name in silent}
        super().__init__(source, others)
