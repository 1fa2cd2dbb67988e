"""Frozen weights: saved once in `frozen-<hash>/` beside the checkpoints that refer to them, and checked.

The hash covers the name, format, shape and bytes of each tensor as a folder would hold it, so it is the same in every
layout and changes with a single bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavlm.checkpoint.atomic import open_staging, staging_path
from megavlm.checkpoint.hf_tensors import folder_tensors
from megavlm.checkpoint.hf_writer import HFWriter, PartIndex, finish
from megavlm.checkpoint.state import TrainState
from megavlm.errors import CheckpointError
from megavlm.parallel.agree import agreed

LIST_FILE = "frozen.json"

Digests = Mapping[str, str]
"""Name of a tensor -> its format, shape and SHA-256."""


def frozen_digests(state: TrainState) -> Digests:
    """Of all frozen tensors of the model; every rank calls it and gets the same."""
    mine = {name: _digest(tensor) for name, tensor in _frozen_tensors(state)}
    everyone: list[Digests] = [{}] * state.groups.world_size
    dist.all_gather_object(everyone, mine)
    merged = {name: digest for one in everyone for name, digest in one.items()}
    return dict(sorted(merged.items()))


def frozen_name(digests: Digests) -> str | None:
    """The folder's name; None where nothing is frozen."""
    if not digests:
        return None
    content = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return f"frozen-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def write_frozen(state: TrainState, digests: Digests, folder: Path) -> None:
    """Write the folder, which appears whole or not at all; every rank calls it."""
    groups = state.groups
    with agreed():
        if groups.rank == 0:
            open_staging(folder, overwrite=True)
    part = _write_part(state, staging_path(folder))
    with agreed():
        if isinstance(part, OSError):
            raise part
    parts: list[PartIndex | None] = [None] * groups.world_size
    dist.all_gather_object(parts, part)
    with agreed():
        if groups.rank == 0:
            listed = (json.dumps(dict(digests), indent=1) + "\n").encode()
            written = [one for one in parts if one is not None]
            finish(staging_path(folder), folder, written, {LIST_FILE: listed}, overwrite=True)


def check_frozen(held: Digests, folder: Path) -> None:
    """Refuse a run whose frozen weights are not those of the (verified) folder."""
    saved: dict[str, str] = json.loads((folder / LIST_FILE).read_bytes())
    for name in sorted(saved.keys() | held.keys()):
        if saved.get(name) != held.get(name):
            raise CheckpointError(
                f"{folder}: {name}",
                saved.get(name),
                f"the run holds {held.get(name)} as this frozen tensor",
                "start from the folder of weights (--load-hf) that the checkpoint's run started from",
            )


def _frozen_tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """On the first rank of each stage of the first data-parallel copy; its tensor-parallel group sends along."""
    if not state.groups.holds_first_copy:
        return
    parts: Sequence[nn.Module] = state.parts
    if state.groups.pipeline_rank > 0:
        # Where all stages encode, each holds the tower; the first one speaks for it.
        parts = [chunk.module for chunk in state.chunks]
    yield from folder_tensors(
        parts, state.state_map, state.groups.collection.tp, wanted=lambda parameter: not parameter.requires_grad
    )


def _digest(tensor: Tensor) -> str:
    held = tensor.detach().to("cpu").contiguous()
    content = hashlib.sha256(held.flatten().view(torch.uint8).numpy().data).hexdigest()
    return f"{str(held.dtype).removeprefix('torch.')} {list(held.shape)} {content}"


def _write_part(state: TrainState, staging: Path) -> PartIndex | OSError | None:
    """A disk that fails is reported when all slices have been sent, so that no rank is left waiting for another."""
    groups = state.groups
    writes = groups.holds_first_copy and groups.tensor_rank == 0
    writer = HFWriter(staging, part=(groups.pipeline_rank, groups.pipeline_size)) if writes else None
    failure: OSError | None = None
    for name, tensor in _frozen_tensors(state):
        if writer and failure is None:
            try:
                writer.add(name, tensor)
            except OSError as error:
                failure = error
    try:
        return failure or (writer.close() if writer else None)
    except OSError as error:
        return error
