"""The pickles that megatron-core's checkpoint format and Transformer Engine's layers make, read without running what
they name.

torch reads `.metadata` with plain pickle, whatever `weights_only` says elsewhere. So it is read here first: a pickle
that calls for anything but the few plain classes it is made of is refused, and torch never opens it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megavlm.errors import CheckpointError

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"

_LARGEST = 2**30
"""A model of a million tensors on a thousand ranks stays below."""
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Forbidden(f"{module}.{name}")


class _Forbidden(Exception):
    pass


def read_metadata(folder: Path) -> Metadata:
    """The list of tensors of a checkpoint; the file is then safe for torch to read again."""
    path = folder / METADATA_FILE
    _check_size(path)
    try:
        metadata = _Restricted(io.BytesIO(path.read_bytes())).load()
    except _Forbidden as error:
        raise _refusal(path, str(error)) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to call for
        raise CheckpointError(str(path), str(error), "is no list of tensors", "take another checkpoint") from error
    if not isinstance(metadata, Metadata):
        kind = type(metadata).__name__
        raise CheckpointError(str(path), kind, "is no list of tensors", "take another checkpoint")
    return metadata


def metadata_bytes(metadata: Metadata) -> bytes:
    """The content of the file."""
    return pickle.dumps(metadata)


def check_common(folder: Path) -> None:
    """Refuse a `common.pt` that holds more than tensors and plain values."""
    path = folder / COMMON_FILE
    _check_size(path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # as above
        raise _refusal(path, str(error).splitlines()[0]) from error


def extra_state_values(content: bytes, layer: str) -> dict[str, Any]:
    """The tensors and plain values of the extra state that a layer of Transformer Engine has pickled.

    From 2.11 to 2.18 it is a dict of `recipe` (an object), under the delayed recipe `scale_fwd`, `amax_history_fwd`,
    `scale_bwd` and `amax_history_bwd` (float32, on the CPU), and `extra_fp8_variables` (numbers, words and lists of
    them; attention puts its recipes there, and makes them anew). Operations have such a dict for each direction.
    """
    try:
        values = _plain(_Inert(io.BytesIO(content)).load())
    except Exception as error:  # another format raises whatever its bytes happen to call for
        raise _no_extra_state(layer, str(error)) from error
    if not isinstance(values, dict):
        raise _no_extra_state(layer, type(values).__name__)
    return values


def extra_state_bytes(values: Mapping[str, Any], recipe: Any) -> bytes:
    """The pickle of such values with the recipe of this run, which `extra_state_values` left out."""
    return pickle.dumps(_with_recipe(values, recipe))


class _Inert(pickle.Unpickler):
    """Makes tensors, and of all else that is no plain value a stand-in that does nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")):
            return super().find_class(module, name)
        return _StandIn


class _StandIn:
    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_LEFT_OUT = object()


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def _plain(value: Any) -> Any:
    """The value without what a stand-in has taken the place of."""
    if isinstance(value, dict):
        kept = {key: _plain(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not _LEFT_OUT}
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _LEFT_OUT if any(item is _LEFT_OUT for item in items) else type(value)(items)
    return value if isinstance(value, Tensor | bool | int | float | str | None) else _LEFT_OUT


def _with_recipe(values: Mapping[str, Any], recipe: Any) -> dict[str, Any]:
    if "extra_fp8_variables" in values:
        return {"recipe": recipe, **values}
    return {name: _with_recipe(one, recipe) for name, one in values.items()}


def _no_extra_state(layer: str, what: str) -> CheckpointError:
    problem = "is no extra state as Transformer Engine 2.11 to 2.18 writes it"
    remedy = "take one of these versions, or another --fp8-recipe"
    return CheckpointError(f"the FP8 scales of {layer}", next(iter(what.splitlines()), ""), problem, remedy)


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _LARGEST:
        raise CheckpointError(f"size of {path}", size, f"is above {_LARGEST} bytes", "take another checkpoint")


def _refusal(path: Path, what: str) -> CheckpointError:
    problem = "is no plain value and could run code on loading"
    return CheckpointError(str(path), what, problem, "do not use this checkpoint unless you know who made it")
