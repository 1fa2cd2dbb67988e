"""The pickles of megatron-core's checkpoint format, read without running what they name.

torch reads `.metadata` with plain pickle, whatever `weights_only` says elsewhere. So it is read here first: a pickle
that calls for anything but the few plain classes it is made of is refused, and torch never opens it.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
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


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _LARGEST:
        raise CheckpointError(f"size of {path}", size, f"is above {_LARGEST} bytes", "take another checkpoint")


def _refusal(path: Path, what: str) -> CheckpointError:
    problem = "is no plain value and could run code on loading"
    return CheckpointError(str(path), what, problem, "do not use this checkpoint unless you know who made it")
