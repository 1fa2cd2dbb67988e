"""One file of weights, safetensors or torch's `.bin`: checked when it is opened, read in pieces afterwards.

Opening a file reads its list of tensors alone; a file that is cut, damaged, or holds anything but tensors is refused
there, before any weight is used. What is read is the caller's own copy: it outlives the file.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavlm.errors import WeightsError

_AGAIN = "copy or download it again"
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
_GIT_LFS = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
# torch.save before 1.6, or with _use_new_zipfile_serialization=False: a pickled magic number comes first.
_OLD_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one of its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A `.safetensors` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = _read_header(path)
        try:
            self._handle: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise WeightsError(f"header of {path}", str(error), "the safetensors library refuses it", _AGAIN) from error

    def read(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        """A copy of tensor `name`, or of the `part` of it."""
        # Both are views of the mapped file: only the pages of the part are touched, and they are copied once.
        view = self._handle.get_slice(name)[part] if part else self._handle.get_tensor(name)
        return view.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._handle = None


class TorchFile:
    """A `.bin` file: a dict of tensors by `torch.save`, in the zip format that can be mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, Tensor] = _map_state(path)
        self.tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.items()}

    def read(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        """A copy of tensor `name`, or of the `part` of it."""
        return self._state[name].detach()[part].clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._state = {}


def open_weight_file(path: Path) -> SafetensorsFile | TorchFile:
    """Open a file of weights by the format that its name says."""
    try:
        return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise WeightsError("weights file", str(path), problem, "check its permissions and its disk") from error


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file whose header describes its data to the last byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        _refuse_git_lfs(path, file)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise WeightsError(f"size of {path}", size, f"a header of 8 + {length} bytes should come first", _AGAIN)
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _info(entry) for name, entry in header.items()}
        spans = sorted((*_span(entry), name) for name, entry in header.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"is damaged ({type(error).__name__}: {error})"
        raise WeightsError(f"header of {path}", text, problem, _AGAIN) from error
    end = 0
    for start, stop, name in spans:
        if start != end or stop - start != tensors[name].nbytes:
            problem = f"is damaged: {tensors[name].nbytes} bytes from {end} on expected, [{start}, {stop}] found"
            raise WeightsError(f"header of {path}", name, problem, _AGAIN)
        end = stop
    if size != 8 + length + end:
        raise WeightsError(f"size of {path}", size, f"its header promises {8 + length + end} bytes", _AGAIN)
    return tensors


def _info(entry: dict[str, Any]) -> TensorInfo:
    shape = tuple(entry["shape"])
    if not all(isinstance(extent, int) and extent >= 0 for extent in shape):
        raise ValueError(f"shape {entry['shape']}")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']}")
    return TensorInfo(shape, _DTYPES[entry["dtype"]])


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    return int(start), int(stop)


def _map_state(path: Path) -> dict[str, Tensor]:
    _refuse_foreign_format(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to call for
        _refuse_unreadable(path, error)
    if not isinstance(state, dict):
        problem, remedy = "is no dict of names and tensors", "save the state_dict() of the model alone"
        raise WeightsError(f"content of {path}", type(state).__name__, problem, remedy)
    for name, value in state.items():
        if isinstance(value, dict):
            problem, remedy = f"is a nested dict of {len(value)} entries", "save this inner dict alone"
            raise WeightsError(f"content of {path}", name, problem, remedy)
        if not isinstance(name, str) or not isinstance(value, Tensor):
            problem = f"is of type {type(value).__name__}, where a name and its tensor belong"
            raise WeightsError(f"content of {path}", name, problem, "save the state_dict() of the model alone")
    return state


def _refuse_foreign_format(path: Path) -> None:
    with path.open("rb") as file:
        _refuse_git_lfs(path, file)
        start = file.read(len(_OLD_TORCH))
    if start == _OLD_TORCH:
        problem = "has the format of torch before 1.6, which cannot be read in pieces"
        raise WeightsError(f"start of {path}", start, problem, f"convert it once: {_conversion(path)}")
    if not start.startswith(_ZIP):
        raise WeightsError(f"start of {path}", start, "is not that of a file by torch.save", _AGAIN)


def _conversion(path: Path) -> str:
    """The command that rewrites an old torch file in the zip format; the old one stays until the new one is whole."""
    old, new = json.dumps(str(path)), json.dumps(f"{path}.new")
    code = f"import os, torch; torch.save(torch.load({old}, weights_only=True), {new}); os.replace({new}, {old})"
    return f"python -c {shlex.quote(code)}"


def _refuse_git_lfs(path: Path, file: BinaryIO) -> None:
    start = file.read(len(_GIT_LFS))
    file.seek(0)
    if start == _GIT_LFS:
        problem = "is a git-lfs pointer, not the weights"
        raise WeightsError(f"start of {path}", start, problem, f"run `git lfs pull` in {path.parent}")


def _refuse_unreadable(path: Path, error: Exception) -> NoReturn:
    forbidden = re.search(r"GLOBAL (\S+)", str(error))
    if forbidden:
        problem, remedy = "is neither a tensor nor a dict of tensors", "save the state_dict() of the model alone"
        raise WeightsError(f"content of {path}", forbidden[1], problem, remedy) from error
    size = path.stat().st_size
    problem = f"torch cannot read a file of these bytes ({str(error).splitlines()[0]})"
    raise WeightsError(f"size of {path}", size, problem, _AGAIN) from error
