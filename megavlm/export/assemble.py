"""A new InfiMM folder out of parts: a decoder's folder, an EVA-CLIP checkpoint, and a fresh resampler and gates.

The gates start at zero, so what the new model says to text is what its decoder says, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from megavlm.checkpoint.atomic import open_staging
from megavlm.checkpoint.fresh import FreshWeights
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import WeightSource, check_folder
from megavlm.checkpoint.hf_writer import HFWriter, finish
from megavlm.checkpoint.sources import AliasedWeights, ComposedWeights
from megavlm.export.hf_export import tokenizer_files
from megavlm.export.infimm_folder import infimm_family_files
from megavlm.model.cross_attention import CrossAttentionConfig
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.state_map import decoder_state_map
from megavlm.model.infimm.config import InfiMMConfig, infimm_from_hf
from megavlm.model.infimm.state_map import infimm_state_map, released_name
from megavlm.model.resampler import ResamplerConfig
from megavlm.model.state_map import StateMap
from megavlm.model.towers.eva_config import EvaConfig
from megavlm.model.towers.eva_state_map import eva_state_map, find_eva_prefix

NEW_TOKENS = 2
"""Rows behind the decoder's vocabulary: the end of a chunk, then the image."""


def assemble_infimm(
    language: str | Path,
    vision: str | Path,
    tower: EvaConfig,
    model_type: str,
    cross_attention: CrossAttentionConfig,
    out: str | Path,
    *,
    dtype: torch.dtype,
    seed: int = 1234,
    resampler: ResamplerConfig | None = None,
) -> None:
    """Write the folder `out`; both parts are checked tensor by tensor before the first is written.

    The resampler is of the released sizes where none is given.
    """
    with HFFolder.open(language) as text, HFFolder.open_file(vision) as eyes:
        plain = DecoderConfig.from_hf(text.config, f"{language}/config.json")
        decoder = plain.replace(vocab_size=plain.vocab_size + NEW_TOKENS)
        parts = InfiMMConfig(
            model_type=model_type,
            tower=tower,
            resampler=resampler or ResamplerConfig(width=tower.width),
            cross_attention=cross_attention,
            eoc_token_id=plain.vocab_size,
            image_token_id=plain.vocab_size + 1,
        )
        check_folder(text, decoder_state_map(plain), str(language))
        prefix = find_eva_prefix(eyes.names(), str(vision))
        check_folder(eyes, eva_state_map(tower, theirs=prefix), str(vision), prefix)
        whole = infimm_state_map(decoder, parts)
        source = ComposedWeights(
            FreshWeights(whole, seed, decoder.init_method_std),
            {
                **{released_name(name): (text, name) for name in decoder_state_map(plain).folder_shapes()},
                **_same_tower(whole, eva_state_map(tower, theirs=prefix), tower, eyes),
            },
            growing=frozenset(map(released_name, ("model.embed_tokens.weight", "lm_head.weight"))),
        )
        write_folder(source, whole, out, dtype, _files(decoder, parts, dtype, language))


def normalise_infimm(released: str | Path, out: str | Path, dtype: torch.dtype) -> None:
    """A released folder (safetensors or .bin, doubled names or not) as a plain one under its first names."""
    with HFFolder.open(released) as folder:
        decoder, parts = infimm_from_hf(folder.config, f"{released}/config.json")
        whole = infimm_state_map(decoder, parts)
        source = AliasedWeights(folder, whole.aliases, str(released))
        check_folder(source, whole, str(released))
        write_folder(source, whole, out, dtype, _files(decoder, parts, dtype, released))


def write_folder(
    source: WeightSource,
    state_map: StateMap,
    out: str | Path,
    dtype: torch.dtype,
    extra: Mapping[str, bytes],
    copies: Mapping[str, str] | None = None,
) -> None:
    """Stream every tensor of the table into a new folder, and the `copies` (name -> which is stored again)."""
    staging = open_staging(out)
    with contextlib.closing(HFWriter(staging, copies=copies)) as writer:
        for name in state_map.folder_shapes():
            writer.add(name, source.read(name).to(dtype))
    finish(staging, out, [writer.close()], extra)


def _same_tower(
    whole: StateMap, tower_map: StateMap, tower: EvaConfig, eyes: WeightSource
) -> dict[str, tuple[WeightSource, str]]:
    """The tower's tensors under the released names, from where they stand in the checkpoint."""
    released = eva_state_map(tower).folder_shapes()
    assert whole.folder_shapes().keys() >= released.keys()
    return {ours: (eyes, theirs) for ours, theirs in zip(released, tower_map.folder_shapes(), strict=True)}


def _files(
    decoder: DecoderConfig, parts: InfiMMConfig, dtype: torch.dtype, tokenizer_from: str | Path
) -> dict[str, bytes]:
    name = str(dtype).removeprefix("torch.")
    return {**tokenizer_files(tokenizer_from), **infimm_family_files(decoder, parts, name)}
