"""The tensors of a checkpoint's shard files by name, whole or in part, read by one process alone.

megatron-core's own way in asks all ranks for the places of their shards in a model; this one needs no model and no
ranks. It reads what overlaps the part that is asked for, and keeps the pieces of one tensor until another is read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megavlm.checkpoint.restricted_pickle import read_metadata
from megavlm.errors import CheckpointError

_REMEDY = "take another checkpoint"


class StoredTensors:
    """Those of one (verified) checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)
        self._tensors = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._last = ""
        self._pieces: dict[tuple[int, ...], Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def read(self, name: str, dimension: int, start: int, stop: int) -> Tensor:
        """[start, stop) along one dimension, all of the others."""
        described = self._tensors[name]
        shape = list(described.size)
        shape[dimension] = stop - start
        found = torch.empty(shape, dtype=described.properties.dtype)
        filled = 0
        for chunk in described.chunks:
            first, length = chunk.offsets[dimension], chunk.sizes[dimension]
            low, high = max(start, first), min(stop, first + length)
            if low >= high:
                continue
            place = [slice(o, o + size) for o, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            place[dimension] = slice(low - start, high - start)
            piece = self._piece(name, chunk).narrow(dimension, low - first, high - low)
            found[tuple(place)] = piece
            filled += piece.numel()
        if filled != found.numel():
            raise CheckpointError(f"{self.folder}: {name}", filled, f"values are there of {found.numel()}", _REMEDY)
        return found

    def _piece(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        if self._last != name:
            self._last, self._pieces = name, {}
        offsets = tuple(chunk.offsets)
        if offsets not in self._pieces:
            self._pieces[offsets] = self._read_piece(name, offsets, tuple(chunk.sizes))
        return self._pieces[offsets]

    def _read_piece(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        where = f"{self.folder}: {name}"
        place = self._metadata.storage_data.get(MetadataIndex(name, torch.Size(offsets)))
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise CheckpointError(where, None if place is None else place.relative_path, "is no place in it", _REMEDY)
        with (self.folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        try:
            piece = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes raise whatever they happen to call for
            raise CheckpointError(where, str(error).splitlines()[0], "is no tensor", _REMEDY) from error
        if not isinstance(piece, Tensor) or piece.shape != torch.Size(sizes):
            shape = tuple(piece.shape) if isinstance(piece, Tensor) else None
            raise CheckpointError(where, shape, f"should be a piece of the shape {tuple(sizes)}", _REMEDY)
        return piece
