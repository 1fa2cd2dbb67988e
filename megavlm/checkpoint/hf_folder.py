"""Reading a Hugging Face folder of weights: its config, and any tensor or part of one by name.

All that can be wrong with the folder is found by `HFFolder.open`, from the headers of its files. Reading is lazy: a
read holds the memory of what it returns and no more, so a tensor-parallel rank pays for its own rows or columns only.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.weight_files import SafetensorsFile, TensorInfo, TorchFile, open_weight_file
from megavlm.errors import WeightsError

# In the order of preference.
_ENTRY_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class HFFolder:
    """The config and the tensors of one Hugging Face folder."""

    def __init__(self, path: Path, config: dict[str, Any], files: dict[str, SafetensorsFile | TorchFile]) -> None:
        """`files` says for the name of each tensor in which file it lies; users call `open`."""
        self.path = path
        self.config = config
        self._files = files

    @classmethod
    def open(cls, path: str | Path) -> HFFolder:
        """Find the files of weights in a folder and check them all by their headers."""
        path = Path(path)
        if not path.is_dir():
            remedy = "give a folder on this machine, for example one made by `hf download NAME --local-dir FOLDER`"
            raise WeightsError("weights folder", str(path), "there is no such folder", remedy)
        return cls(path, _read_json(path / "config.json"), _open_files(path))

    @classmethod
    def open_weights(cls, path: Path) -> HFFolder:
        """The same of a folder that holds weights and no config."""
        return cls(path, {}, _open_files(path))

    @classmethod
    def open_file(cls, path: str | Path) -> HFFolder:
        """A single file of weights as if it were a folder without a config (a checkpoint of a vision tower)."""
        path = Path(path)
        if not path.is_file():
            raise WeightsError("weights file", str(path), "there is no such file", "give a .safetensors, .pt or .bin")
        file = open_weight_file(path)
        return cls(path, {}, dict.fromkeys(file.tensors, file))

    def __enter__(self) -> HFFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        for file in self._files.values():
            file.close()

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._info(name).dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._file(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """The slice `tensor[start:stop]`."""
        return self._read_slice(name, 0, start, stop)

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """The slice `tensor[:, start:stop]`."""
        return self._read_slice(name, 1, start, stop)

    def _read_slice(self, name: str, dimension: int, start: int, stop: int) -> Tensor:
        shape = self.shape(name)
        assert len(shape) > dimension and 0 <= start <= stop <= shape[dimension], (name, shape, dimension, start, stop)
        return self._file(name).read(name, (slice(None),) * dimension + (slice(start, stop),))

    def _info(self, name: str) -> TensorInfo:
        return self._file(name).tensors[name]

    def _file(self, name: str) -> SafetensorsFile | TorchFile:
        if name not in self._files:
            nearest = difflib.get_close_matches(name, self._files)
            remedy = f"the nearest names are {', '.join(nearest)}" if nearest else f"its names start {self.names()[:3]}"
            raise WeightsError(f"tensor of {self.path}", name, "the folder holds no tensor of this name", remedy)
        return self._files[name]


def eos_token_ids(path: str | Path) -> tuple[int, ...]:
    """The tokens that end a text, as the folder's generation_config.json says, or else its config.json."""
    generation = Path(path) / "generation_config.json"
    config = _read_json(Path(path) / "config.json")
    # A model with eyes describes its decoder in a section of its own.
    places = [
        _read_json(generation) if generation.is_file() else {},
        config,
        config.get("language", {}),
        config.get("text_config", {}),
    ]
    found: Any = next((place["eos_token_id"] for place in places if place.get("eos_token_id") is not None), [])
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) for token in ids):
        raise WeightsError(f"{path}: eos_token_id", found, "is no token", "write a number, or a list of numbers")
    return tuple(ids)


def _open_files(path: Path) -> dict[str, SafetensorsFile | TorchFile]:
    """The file of each tensor of a folder."""
    entry = next((path / name for name in _ENTRY_FILES if (path / name).is_file()), None)
    if entry is None:
        problem = f"holds none of {', '.join(_ENTRY_FILES)}"
        raise WeightsError("weights folder", str(path), problem, "copy or download the weights into it")
    if entry.suffix == ".json":
        return _open_shards(entry)
    file = open_weight_file(entry)
    return dict.fromkeys(file.tensors, file)


def _open_shards(index: Path) -> dict[str, SafetensorsFile | TorchFile]:
    """The file of each tensor, where the index and the shards agree."""
    where = f"weight_map of {index}"
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise WeightsError(where, weight_map, "should give a file for each tensor", "copy or download it again")
    shards: dict[str, SafetensorsFile | TorchFile] = {}
    for shard in sorted(set(weight_map.values())):
        # A name like ../x must not lead out of the folder.
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise WeightsError(where, shard, f"there is no such file in {index.parent}", "copy or download it again")
        shards[shard] = open_weight_file(index.parent / shard)
    first: dict[str, str] = {}
    for shard, file in shards.items():
        for name in file.tensors:
            if name in first:
                problem = f"is both in {first[name]} and in {shard}"
                raise WeightsError(f"tensor of {index.parent}", name, problem, "download all shards from one place")
            first[name] = shard
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            problem = f"{shard} holds no such tensor"
            raise WeightsError(where, name, problem, "download the index and all shards from one place")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError("weights folder", str(path.parent), f"{path.name} is missing", "copy or download it")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"content of {path}", str(error), "is not JSON", "copy or download it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"content of {path}", content, "should be a JSON object", "copy or download it again")
    return content
