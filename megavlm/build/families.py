"""What differs between the families of models, for all that builds, reads or writes one.

A run has a decoder, and around it the parts of InfiMM, those of Aquila-VL, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megavlm.build.run_config import AquilaVLConfig, DecoderConfig, InfiMMConfig, RunConfig
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.data.tokenizer import Tokenizer, has_tokenizer
from megavlm.errors import ConfigError
from megavlm.model.aquila_vl.config import aquila_vl_from_hf, is_aquila_vl
from megavlm.model.aquila_vl.model import AquilaVL, build_aquila_vl
from megavlm.model.aquila_vl.state_map import TRANSFORMERS, Spelling, aquila_vl_state_map, find_spelling
from megavlm.model.backend import BackendSpecProvider
from megavlm.model.decoder.model import Decoder, build_decoder
from megavlm.model.decoder.state_map import decoder_state_map
from megavlm.model.empty import build_empty
from megavlm.model.infimm.config import infimm_from_hf
from megavlm.model.infimm.model import build_infimm
from megavlm.model.infimm.state_map import infimm_state_map
from megavlm.model.state_map import StateMap
from megavlm.model.towers.eva import EvaTower
from megavlm.model.towers.siglip import SiglipTower
from megavlm.parallel.groups import Groups
from megavlm.parallel.media_inputs import AttendedInputs, SplicedInputs
from megavlm.parallel.schedule import InputFunction
from megavlm.parallel.stages import ChunkBuilder


def chunk_builder(run: RunConfig, provider: BackendSpecProvider) -> ChunkBuilder:
    """What builds one pipeline chunk."""
    common = (provider, run.make_vocab_size_divisible_by)
    if run.infimm is not None:
        return partial(build_infimm, run.decoder, run.infimm, "new_tokens" in run.trainable, *common)
    if run.aquila_vl is not None:
        train_tower = "tower" in run.trainable
        return partial(build_aquila_vl, run.decoder, run.aquila_vl, train_tower, run.recompute.vision_tower, *common)
    return partial(build_decoder, run.decoder, *common)


def frozen_tower(run: RunConfig, groups: Groups) -> nn.Module | None:
    """The vision tower, uninitialised, on the ranks that encode; none where it is trained as a part of the chunk."""
    if groups.pipeline_rank > 0 and run.parallel.vision_over != "all_stages":
        return None
    build: Callable[[], nn.Module]
    if run.infimm is not None:
        build = partial(EvaTower, run.infimm.tower)
    elif run.aquila_vl is not None and "tower" not in run.trainable:
        build = partial(SiglipTower, run.aquila_vl.tower)
    else:
        return None
    return build_empty(build, groups.device, run.precision.dtype).requires_grad_(False).eval()


def media_inputs(
    run: RunConfig, chunks: list[Decoder], tower: nn.Module | None, groups: Groups
) -> InputFunction | None:
    """What feeds the chunks images; `tower` is the frozen one."""
    over_all_stages = run.parallel.vision_over == "all_stages"
    if run.infimm is not None:
        return AttendedInputs(tower, run.infimm.tower.patches, groups, over_all_stages)
    if run.aquila_vl is not None:
        first = chunks[0]
        if tower is None and isinstance(first, AquilaVL) and first.pre_process:
            tower = first.tower
        tokens, sliced = run.aquila_vl.tower.tokens, run.parallel.sequence_parallel
        return SplicedInputs(tower, tokens, groups, over_all_stages, sequence_parallel=sliced)
    return None


def state_map_of(run: RunConfig, spelling: Spelling = TRANSFORMERS) -> StateMap:
    """The table of the whole model's weights; the layouts of Aquila-VL's folders spell them differently."""
    if run.infimm is not None:
        return infimm_state_map(run.decoder, run.infimm)
    if run.aquila_vl is not None:
        return aquila_vl_state_map(run.decoder, run.aquila_vl, spelling)
    return decoder_state_map(run.decoder)


@dataclass(frozen=True)
class FolderModel:
    """What a Hugging Face folder holds."""

    decoder: DecoderConfig
    infimm: InfiMMConfig | None = None
    aquila_vl: AquilaVLConfig | None = None
    spelling: Spelling = TRANSFORMERS
    """How the folder names its tensors, where the family knows several ways."""


def model_of_folder(folder: HFFolder, tokens_of_tags: tuple[int, int] | None = None) -> FolderModel:
    """The model that a folder's config, tokenizer and names describe.

    `tokens_of_tags`: those of `<image>` and `<video>`, where they are not to be asked of the folder's own tokenizer.
    """
    config, where = folder.config, f"{folder.path}/config.json"
    kind = config.get("model_type")
    if kind is None:
        raise ConfigError(f"{where}: model_type", None, "is missing", "take a folder that transformers can load")
    if str(kind).startswith("infimm"):
        decoder, infimm = infimm_from_hf(config, where)
        return FolderModel(decoder, infimm=infimm)
    if not is_aquila_vl(config):
        return FolderModel(DecoderConfig.from_hf(config, where))
    decoder, aquila_vl = aquila_vl_from_hf(config, where, tokens_of_tags or _tokens_of_tags(folder))
    spelling = find_spelling(folder.names(), str(folder.path))
    if _is_tied(folder, spelling):
        # Exports store a tied output layer as well, and some then say that it was not tied.
        decoder = decoder.replace(tied_embeddings=True)
    return FolderModel(decoder, aquila_vl=aquila_vl, spelling=spelling)


def _tokens_of_tags(folder: HFFolder) -> tuple[int | None, int | None]:
    if not has_tokenizer(folder.path):
        return None, None
    tokenizer = Tokenizer(folder.path)
    return tokenizer.token_of("<image>"), tokenizer.token_of("<video>")


def _is_tied(folder: HFFolder, spelling: Spelling) -> bool:
    """Whether the output layer is the embedding: not stored, or stored with the same values."""
    if spelling.head not in folder.names():
        return True
    if folder.shape(spelling.head) != folder.shape(spelling.embedding):
        return False
    return torch.equal(folder.read(spelling.head), folder.read(spelling.embedding))
