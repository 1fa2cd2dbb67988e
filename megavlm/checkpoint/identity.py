"""Whether a checkpoint is of the model that a run has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.errors import CheckpointError


def check_identity(saved: Mapping[str, Any], mine: Mapping[str, Any], file: Path, remedy: str) -> None:
    """Refuse a checkpoint of another model, by the first setting that differs."""
    found = differing(saved, mine)
    if found is not None:
        name, theirs, ours = found
        raise CheckpointError(f"{file}: {name}", theirs, f"this run has {ours!r}", remedy)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that is not the same, and what it is in both; None where all are."""
    first, second = dict(_flat(one)), dict(_flat(other))
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            return name, first.get(name), second.get(name)
    return None


def _flat(data: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(data, Mapping):
        return [pair for key, value in data.items() for pair in _flat(value, f"{name}.{key}" if name else str(key))]
    return [(name, list(data) if isinstance(data, list | tuple) else data)]
