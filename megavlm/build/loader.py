"""From a run's data settings to its loader."""

from __future__ import annotations

import torch

from megavlm.build.model import Model
from megavlm.build.run_config import RunConfig
from megavlm.data.decode import DecodeConfig, open_decoder
from megavlm.data.decode_jobs import CLIP, TILED
from megavlm.data.formats import AttendedFormat, SampleFormat, SplicedFormat
from megavlm.data.loader import Loader
from megavlm.data.step_plan import open_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import ConfigError
from megavlm.parallel.groups import Groups
from megavlm.parallel.media_inputs import MediaInputs
from megavlm.tiles import GridConfig


def build_words(run: RunConfig) -> SampleFormat:
    """How the run's family reads samples."""
    assert run.data is not None
    folder = run.tokenizer_folder
    if folder is None:
        raise ConfigError("data.tokenizer", None, "is missing", "name a folder with a tokenizer, or use --load-hf")
    tokenizer = Tokenizer(folder)
    _check_tags(run, tokenizer)
    if run.aquila_vl is not None:
        return SplicedFormat(tokenizer, run.data.chat, run.aquila_vl.grid, run.aquila_vl.placeholders)
    if run.infimm is not None:
        return AttendedFormat(tokenizer, run.data.chat, run.infimm.image_token_id, _grid(run))
    return AttendedFormat(tokenizer, run.data.chat, -1, _grid(run))


def _grid(run: RunConfig) -> GridConfig:
    """How pictures are cut; a decoder alone sees none."""
    if run.aquila_vl is not None:
        return run.aquila_vl.grid
    if run.infimm is None:
        return GridConfig(tiling="single")
    tower = run.infimm.tower
    return GridConfig(tile_size=tower.image_size, patch_size=tower.patch_size, tiling="single")


def _check_tags(run: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that writes tags with other tokens than the model reads."""
    for section, name, tag in (
        ("infimm", "image_token_id", "<image>"),
        ("aquila_vl", "image_token_id", "<image>"),
        ("aquila_vl", "video_token_id", "<video>"),
    ):
        model, found = getattr(run, section), tokenizer.token_of(tag)
        if model is None or getattr(model, name) == found:
            continue
        problem = f"the tokenizer in {tokenizer.folder} has {'no token' if found is None else found} for {tag}"
        remedy = "take the model's own" if found is None else f"take the model's own, or set {section}.{name}={found}"
        raise ConfigError(f"{section}.{name}", getattr(model, name), problem, remedy)


def build_loader(run: RunConfig, model: Model, groups: Groups) -> Loader:
    """The loader of this rank."""
    assert run.data is not None
    words = build_words(run)
    grid = _grid(run)
    rule = TILED if run.infimm is None else CLIP
    decoder = open_decoder(rule, grid, DecodeConfig(decoder=run.data.decoder, threads=max(1, run.data.threads)))
    own = model.inputs.own_pictures if isinstance(model.inputs, MediaInputs) else no_pictures
    return Loader(
        run.data,
        words,
        open_sources(run.data, words),
        decoder,
        own,
        seed=run.train.seed,
        data_rank=groups.data_rank,
        data_size=groups.data_size,
        empty=torch.empty(0, 3 * grid.patch_size**2),
    )


def no_pictures(tiles: object) -> list[tuple[int, ...]]:
    """Of a decoder alone, whose data have none."""
    return [() for _ in tiles]  # type: ignore[attr-defined]
