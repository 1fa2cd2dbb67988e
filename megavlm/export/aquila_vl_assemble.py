"""Aquila-VL folders to start from: released ones in any spelling, and new ones out of a decoder and a SigLIP tower.

All are written in transformers' layout, with a tokenizer that knows the tags. Their tokens take rows of the vocabulary
that no word uses where there are such (Qwen2.5 has 271); else the vocabulary grows, by rows of its mean.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megavlm.build.families import model_of_folder
from megavlm.checkpoint.fresh import FreshWeights
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import check_folder
from megavlm.checkpoint.sources import AliasedWeights, ComposedWeights, GrownWeights
from megavlm.errors import ConfigError
from megavlm.export.aquila_vl_folder import aquila_vl_family_files
from megavlm.export.assemble import write_folder
from megavlm.export.tagged_tokenizer import TaggedTokenizer, tagged_tokenizer
from megavlm.log import get_logger
from megavlm.model.aquila_vl.config import AquilaVLConfig
from megavlm.model.aquila_vl.state_map import TRANSFORMERS, aquila_vl_state_map
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.state_map import decoder_state_map
from megavlm.model.towers.siglip_config import SIGLIP_SO400M, SiglipConfig
from megavlm.model.towers.siglip_state_map import find_siglip_prefix, is_unused, siglip_state_map
from megavlm.tiles import GridConfig

logger = get_logger(__name__)

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def assemble_aquila_vl(
    language: str | Path, siglip: str | Path, out: str | Path, *, dtype: torch.dtype, seed: int = 1234
) -> None:
    """Write the folder `out`: a decoder, a tower less its last block, a fresh projector and newline.

    `siglip` is a folder, or a file of google/siglip-so400m-patch14-384's weights. Both parts are checked tensor by
    tensor before the first is written.
    """
    with HFFolder.open(language) as text, _open_siglip(siglip) as eyes:
        plain = DecoderConfig.from_hf(text.config, f"{language}/config.json")
        check_folder(text, decoder_state_map(plain), str(language))
        tower = _shape_of_siglip(eyes, siglip)
        prefix = find_siglip_prefix(eyes.names(), str(siglip))
        theirs = siglip_state_map(tower, theirs=prefix)
        check_folder(eyes, theirs, str(siglip), unused=partial(is_unused, prefix=prefix, depth=tower.depth))
        tokenizer = tagged_tokenizer(language)
        grid = GridConfig(tile_size=tower.image_size, patch_size=tower.patch_size)
        parts = AquilaVLConfig(tower=tower, grid=grid, image_token_id=tokenizer.image, video_token_id=tokenizer.video)
        decoder = _with_room(plain, tokenizer)
        whole = aquila_vl_state_map(decoder, parts)
        words = GrownWeights(text, _VOCABULARY, decoder.vocab_size)
        in_folder = siglip_state_map(tower, theirs=TRANSFORMERS.tower).folder_shapes()
        source = ComposedWeights(
            FreshWeights(whole, seed, decoder.init_method_std),
            {
                **{TRANSFORMERS.name(name): (words, name) for name in decoder_state_map(plain).folder_shapes()},
                **{ours: (eyes, name) for ours, name in zip(in_folder, theirs.folder_shapes(), strict=True)},
            },
        )
        extra = aquila_vl_family_files(decoder, parts, _name(dtype), "transformers", tokenizer, language)
        write_folder(source, whole, out, dtype, extra, whole.copies)


def normalise_aquila_vl(released: str | Path, out: str | Path, dtype: torch.dtype) -> None:
    """A released folder (LLaVA-NeXT's layout or transformers', safetensors or .bin) in transformers' layout."""
    with HFFolder.open(released) as folder:
        tokenizer = tagged_tokenizer(released)
        found = model_of_folder(folder, tokenizer.tokens)
        parts = found.aquila_vl
        assert parts is not None, "callers look at the family first"
        theirs = aquila_vl_state_map(found.decoder, parts, found.spelling)
        check_folder(folder, theirs, str(released))
        logger.info(
            "the output layer %s", "is the embedding" if found.decoder.tied_embeddings else "has weights of its own"
        )
        decoder = _with_room(found.decoder, tokenizer)
        whole = aquila_vl_state_map(decoder, parts)
        names = zip(theirs.folder_shapes(), whole.folder_shapes(), strict=True)
        renamed = AliasedWeights(folder, {old: new for old, new in names if old != new}, str(released))
        source = GrownWeights(renamed, [TRANSFORMERS.name(name) for name in _VOCABULARY], decoder.vocab_size)
        extra = aquila_vl_family_files(decoder, parts, _name(dtype), "transformers", tokenizer, released)
        write_folder(source, whole, out, dtype, extra, whole.copies)


def _with_room(decoder: DecoderConfig, tokenizer: TaggedTokenizer) -> DecoderConfig:
    """The decoder with rows for the tags' tokens."""
    needed = max(tokenizer.tokens) + 1
    if needed <= decoder.vocab_size:
        return decoder
    logger.info("the vocabulary grows from %d to %d rows", decoder.vocab_size, needed)
    return decoder.replace(vocab_size=needed)


def _open_siglip(siglip: str | Path) -> HFFolder:
    return HFFolder.open(siglip) if Path(siglip).is_dir() else HFFolder.open_file(siglip)


def _shape_of_siglip(eyes: HFFolder, siglip: str | Path) -> SiglipConfig:
    """Its shape less the last block; a single file has no config, and is taken for the one that is commonly used."""
    if not eyes.config:
        return SIGLIP_SO400M
    where, kind = f"{siglip}/config.json", eyes.config.get("model_type")
    if kind == "siglip_vision_model":
        return SiglipConfig.from_hf(eyes.config, where, unused=1)
    if kind != "siglip" or not isinstance(eyes.config.get("vision_config"), dict):
        raise ConfigError(
            f"{where}: model_type", kind, "is no SigLIP", "take a folder of siglip or siglip_vision_model"
        )
    return SiglipConfig.from_hf(eyes.config["vision_config"], f"{where}: vision_config", unused=1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
