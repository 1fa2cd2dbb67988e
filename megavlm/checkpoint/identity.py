"""Whether a checkpoint is of the model that a run has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.errors import CheckpointError


def check_identity(saved: Mapping[str, Any], mine: Mapping[str, Any], file: Path, remedy: str) -> None:
    """Refuse a checkpoint of another model, by the first setting that differs."""
    theirs, ours = dict(_flat(saved)), dict(_flat(mine))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            problem = f"this run has {ours.get(name)!r}"
            raise CheckpointError(f"{file}: {name}", theirs.get(name), problem, remedy)


def _flat(data: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(data, Mapping):
        return [pair for key, value in data.items() for pair in _flat(value, f"{name}.{key}" if name else str(key))]
    return [(name, list(data) if isinstance(data, list | tuple) else data)]
