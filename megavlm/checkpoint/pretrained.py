"""The weights alone of a checkpoint, trained and frozen parts together, for any run of the same model to start from.

What was trained lies in the shard files, whole and in the order that one process would hold it; what was frozen lies
beside them under a folder's names. Together they are a source of weights like any Hugging Face folder, so the layout
and the trainable parts of the reader don't matter.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint import shelf
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.identity import check_identity
from megavlm.checkpoint.stored_tensors import StoredTensors
from megavlm.checkpoint.verify import verify_folders
from megavlm.errors import CheckpointError
from megavlm.model.decoder.spec import FUSED_NORM_NAMES
from megavlm.model.state_map import Entry, StateMap
from megavlm.parallel.agree import agreed, said_by_first
from megavlm.parallel.groups import Groups


def find_checkpoint(path: str | Path, where: str) -> Path:
    """The checkpoint that a folder means: its latest one, or itself; `where` names the option in errors."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(where, str(path), "there is no such folder", "name a folder that --save has filled")
    if re.fullmatch(r"iter_\d+", path.resolve().name):
        return path
    step = shelf.latest_step(path)
    if step is None:
        raise CheckpointError(where, str(path), "holds no checkpoint", "name a folder that --save has filled")
    return shelf.checkpoint_path(path, step)


@contextlib.contextmanager
def pretrained_weights(
    path: str | Path, state_map: StateMap, identity: Mapping[str, Any], groups: Groups
) -> Iterator[CheckpointWeights]:
    """The weights of a checkpoint whose every byte has been checked, and which is one of this model.

    All ranks enter it together, and get the same error where one of them does.
    """
    found: list[Path] = []
    with agreed():
        if groups.rank == 0:
            found = [find_checkpoint(path, "--pretrained-checkpoint")]
    folder: Path = said_by_first(found)[0]
    verify_folders([folder], [], groups.rank, groups.world_size, groups.device)
    with agreed():
        record = shelf.read_run(folder)
        mine = {name: value for name, value in record["identity"].items() if name in identity}
        check_identity(mine, identity, folder / shelf.RUN_FILE, "take a checkpoint of the same model")
    frozen = folder.parent / record["frozen"] if record["frozen"] is not None else None
    if frozen is not None:
        verify_folders([], [frozen], groups.rank, groups.world_size, groups.device)
    with contextlib.ExitStack() as files:
        with agreed():
            beside = files.enter_context(HFFolder.open_weights(frozen)) if frozen is not None else None
            weights = CheckpointWeights(StoredTensors(folder), beside, state_map)
        yield weights


class CheckpointWeights:
    """A source of weights with the names and shapes of the state map."""

    def __init__(self, stored: StoredTensors, frozen: HFFolder | None, state_map: StateMap) -> None:
        self.folder = stored.folder
        self._stored, self._frozen, self._map = stored, frozen, state_map
        self._trained = {
            name: (entry, key)
            for entry in state_map.entries
            if (key := _key(entry.ours)) in stored
            for name in entry.theirs
        }
        by_name = {entry.ours: entry for entry in state_map.entries}
        self._rows_apart = {
            name: (key, tokens)
            for key, (ours, tokens) in state_map.rows_apart.items()
            if key in stored
            for name in by_name[ours].theirs
        }
        for entry, key in self._trained.values():
            self._check_shape(entry, key)

    def names(self) -> Sequence[str]:
        beside = self._frozen.names() if self._frozen is not None else []
        return sorted({*self._trained, *beside})

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._trained:
            return self._map.shape(self._trained[name][0], name)
        return self._beside.shape(name)

    def read(self, name: str) -> Tensor:
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self._read_rows(name, start, stop)
        if name in self._rows_apart:
            key, tokens = self._rows_apart[name]
            learnt = self._stored.read(key, 0, 0, len(tokens))
            for row, token in enumerate(tokens):
                if start <= token < stop:
                    rows[token - start] = learnt[row]
        return rows

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._trained:
            return self._beside.read_columns(name, start, stop)
        entry, key = self._trained[name]
        if entry.split != "columns":
            return self.read(name)[:, start:stop]
        return self._stored.read(key, 1, start, stop)

    def _read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._trained:
            return self._beside.read_rows(name, start, stop)
        entry, key = self._trained[name]
        pieces, top = [], 0
        for block in self._map.blocks(entry, tensor_parallel=1):
            low, high = max(start, block.start), min(stop, block.start + block.count)
            if block.source == name and low < high:
                first = top + low - block.start
                pieces.append(self._stored.read(key, 0, first, first + high - low))
            top += block.count
        return torch.cat(pieces).view(stop - start, *self.shape(name)[1:])

    @property
    def _beside(self) -> HFFolder:
        assert self._frozen is not None
        return self._frozen

    def _check_shape(self, entry: Entry, key: str) -> None:
        """Refuse a tensor that is not as large as those that it is made of."""
        shapes = [self._map.shape(entry, name) for name in entry.theirs]
        rows, width = sum(shape[0] for shape in shapes), math.prod(shapes[0][1:])
        found = self._stored.shape(key)
        enough = found[0] >= rows if entry.padded else found[0] == rows
        if not enough or math.prod(found[1:]) != width:
            problem = f"the model needs {rows} rows of {width} values"
            raise CheckpointError(f"{self.folder}: {key}", found, problem, "take a checkpoint of this model")


def _key(ours: str) -> str:
    """What checkpoints call a parameter: a norm as if it were held inside the linear layer behind it."""
    for apart, inside in FUSED_NORM_NAMES.items():
        ours = re.sub(rf"(\.layers\.\d+\.){re.escape(apart)}", rf"\g<1>{inside}", ours)
    return ours
