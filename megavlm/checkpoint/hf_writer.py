"""Writing the weights of a Hugging Face folder as a stream, by one process or by several at once.

One process opens the staging folder (`checkpoint.atomic.open_staging`); each process adds its tensors to an
`HFWriter` of its own, which writes a shard whenever one is full; one process collects the `PartIndex` of each writer
and calls `finish`. The same tensors in the same order give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megavlm.checkpoint.atomic import commit, file_sum, write_sums

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class ShardEntry:
    """A file of the staging folder, with its SHA-256."""

    file: str
    sha256: str
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class PartIndex:
    """What one writer wrote: part `index` (from 0) `of` so many. Plain values, to be gathered over processes."""

    index: int
    of: int
    shards: tuple[ShardEntry, ...]


class HFWriter:
    """Collects tensors in the order they come and writes a shard when the next one would not fit.

    A tensor is copied when it is added: memory holds one shard, whatever the tensors are views of.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = 4 * 2**30,
        part: tuple[int, int] | None = None,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        """`copies`: tensors that repeat others and are stored all the same, name -> which is stored again."""
        self.folder = Path(folder)
        self._copies = {original: copy for copy, original in (copies or {}).items()}
        self.max_shard_bytes = max_shard_bytes
        self._index, self._of = part or (0, 1)
        assert 0 <= self._index < self._of, part
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._names: set[str] = set()
        self._shards: list[ShardEntry] = []

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()

    def add(self, name: str, tensor: Tensor) -> None:
        assert name not in self._names, f"{name} was added before"
        self._names.add(name)
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._write_shard()
        self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        if name in self._copies:
            self.add(self._copies[name], tensor)

    def close(self) -> PartIndex:
        """Write what is left, and say what this writer wrote."""
        if self._pending:
            self._write_shard()
        return PartIndex(self._index, self._of, tuple(self._shards))

    def _write_shard(self) -> None:
        file = self.folder / f"part-{self._index:05d}-shard-{len(self._shards):05d}.safetensors"
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except SafetensorError as error:  # what it calls a full disk
            raise OSError(f"{file}: {error}") from error
        # safetensors 0.8 makes files that their owner alone can read: give them the permissions of the folder.
        file.chmod(self.folder.stat().st_mode & 0o666)
        tensors = tuple(TensorEntry(name, tuple(tensor.shape), tensor.nbytes) for name, tensor in self._pending.items())
        self._shards.append(ShardEntry(file.name, file_sum(file), tensors))
        self._pending, self._pending_bytes = {}, 0


def finish(
    staging: Path,
    final: str | Path,
    parts: Sequence[PartIndex],
    extra_files: Mapping[str, bytes],
    overwrite: bool = False,
) -> None:
    """Give the shards of all parts their names, write the index, `extra_files` and checksums, and commit the folder."""
    parts = sorted(parts, key=lambda part: part.index)
    assert [(part.index, part.of) for part in parts] == [(i, len(parts)) for i in range(len(parts))], parts
    shards = [shard for part in parts for shard in part.shards]
    assert shards, "no tensor was added"
    sums: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (staging / shard.file).rename(staging / file)
        sums[file] = shard.sha256
        for tensor in shard.tensors:
            assert tensor.name not in weight_map, f"{tensor.name} is in {weight_map[tensor.name]} and in {file}"
            weight_map[tensor.name] = file
    if len(shards) > 1:
        tensors = [tensor for shard in shards for tensor in shard.tensors]
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        size = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weight_map}
        (staging / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, content in extra_files.items():
        assert not (staging / name).exists(), f"{name} is written already"
        (staging / name).write_bytes(content)
    write_sums(staging, sums)
    commit(staging, final, overwrite)
