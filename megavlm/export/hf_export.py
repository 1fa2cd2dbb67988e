"""A trained model as a Hugging Face folder, written by all pipeline stages at once.

The tensor-parallel slices of each parameter are gathered on the first rank of the stage, taken apart into the
folder's tensors (padding left out) and streamed into shards, so no process ever holds more than one shard of the
folder and one parameter.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from megavlm.build.families import state_map_of
from megavlm.build.model import Model
from megavlm.build.run_config import RunConfig
from megavlm.checkpoint.atomic import open_staging, staging_path
from megavlm.checkpoint.hf_tensors import folder_tensors
from megavlm.checkpoint.hf_writer import HFWriter, PartIndex, finish
from megavlm.errors import ConfigError
from megavlm.export.aquila_vl_folder import SPELLINGS, Layout, aquila_vl_family_files
from megavlm.export.infimm_folder import infimm_family_files
from megavlm.export.tagged_tokenizer import has_tokenizer, tagged_tokenizer
from megavlm.parallel.agree import agreed
from megavlm.parallel.groups import Groups

# What transformers needs beside weights and config.json to tokenize and generate; taken over from the source folder.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def export_model(
    model: Model,
    run: RunConfig,
    groups: Groups,
    folder: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    layout: Layout = "transformers",
    overwrite: bool = False,
) -> None:
    """Write the folder; every rank calls it, and it exists for all of them when it returns.

    `layout` says how Aquila-VL's folder is spelled; those of the other families have one spelling.
    """
    for chunk in model.chunks:
        chunk.settle()
    extra: dict[str, bytes] = {}
    with agreed():
        _check_layout(run, layout)
        if groups.rank == 0:
            extra = _extra_files(run, layout, tokenizer_from)
            open_staging(folder, overwrite)
    part = _write_part(model, run, groups, staging_path(folder), layout) if groups.holds_first_copy else None
    with agreed():
        if isinstance(part, OSError):
            raise part
    parts: list[PartIndex | None] = [None] * groups.world_size
    dist.all_gather_object(parts, part)
    with agreed():
        if groups.rank == 0:
            finish(staging_path(folder), folder, [p for p in parts if p is not None], extra, overwrite)


def _write_part(
    model: Model, run: RunConfig, groups: Groups, staging: Path, layout: Layout
) -> PartIndex | OSError | None:
    """This stage's shards, written by its first tensor-parallel rank; the others only send their slices.

    A disk that fails is reported when all slices have been sent, so that no rank is left waiting for another.
    """
    state_map = state_map_of(run, SPELLINGS[layout])
    # Aquila-VL's folders hold the output layer also where it is the embedding: readers that look for it find it.
    copies = state_map.copies if run.aquila_vl is not None else None
    part = (groups.pipeline_rank, groups.pipeline_size)
    writer = HFWriter(staging, part=part, copies=copies) if groups.tensor_rank == 0 else None
    failure: OSError | None = None
    # Where all stages encode, each holds the tower; the first one writes it.
    parts = model.parts() if groups.pipeline_rank == 0 else model.chunks
    for name, tensor in folder_tensors(parts, state_map, groups.collection.tp):
        if writer and failure is None:
            try:
                writer.add(name, tensor.to(run.precision.dtype))
            except OSError as error:
                failure = error
    if writer is None or failure:
        return failure
    try:
        return writer.close()
    except OSError as error:
        return error


def _check_layout(run: RunConfig, layout: Layout) -> None:
    if layout != "transformers" and run.aquila_vl is None:
        raise ConfigError("layout", layout, "is one of Aquila-VL's folders alone", "use transformers")


def _extra_files(run: RunConfig, layout: Layout, tokenizer_from: str | Path | None) -> dict[str, bytes]:
    """All that the folder holds beside weights."""
    dtype = str(run.precision.dtype).removeprefix("torch.")
    if run.aquila_vl is not None:
        tokenizer = tagged_tokenizer(tokenizer_from) if tokenizer_from and has_tokenizer(tokenizer_from) else None
        return aquila_vl_family_files(run.decoder, run.aquila_vl, dtype, layout, tokenizer, tokenizer_from)
    if run.infimm is not None:
        return {**tokenizer_files(tokenizer_from), **infimm_family_files(run.decoder, run.infimm, dtype)}
    config = (json.dumps(run.decoder.to_hf(dtype), indent=2) + "\n").encode()
    return {**tokenizer_files(tokenizer_from), "config.json": config}


def tokenizer_files(folder: str | Path | None) -> dict[str, bytes]:
    """What the folder holds beside weights and config.json, to go along with them."""
    if folder is None:
        return {}
    return {name: (Path(folder) / name).read_bytes() for name in _TOKENIZER_FILES if (Path(folder) / name).is_file()}
