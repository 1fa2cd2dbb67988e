"""The folder of a run's checkpoints: which there are, which is the latest, which are dropped.

iter_0000100/                        a checkpoint: it has this name only when it is whole
frozen-<hash>/                       the weights that do not change, once for all checkpoints that refer to them
latest_checkpointed_iteration.txt    the number of the checkpoint to go on from, as Megatron writes it
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.checkpoint.atomic import replace_file
from megavlm.errors import CheckpointError

LATEST_FILE = "latest_checkpointed_iteration.txt"
RUN_FILE = "run.json"
FORMAT = 1

_NAME = re.compile(r"iter_(\d{7,})")
_LEFTOVER = re.compile(r"\.((?:iter_\d{7,}|frozen-[0-9a-f]{32}))\.(partial|replaced|dropped)")
_FROZEN = re.compile(r"frozen-[0-9a-f]{32}")
_FIELDS: dict[str, tuple[Any, str]] = {
    "format": (int, "a number"),
    "step": (int, "a number"),
    "optimizer_steps": (int, "a number"),
    "scheduler_steps": (int, "a number"),
    "layout": (dict, "an object"),
    "identity": (dict, "an object"),
    "frozen": (str | None, "the name of a folder, or null"),
}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"iter_{step:07d}"


def steps_saved(folder: Path) -> list[int]:
    """The steps of all checkpoints, ascending."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(item.name) for item in os.scandir(folder) if item.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def latest_step(folder: Path) -> int | None:
    """The step to go on from; None where there is no checkpoint."""
    path = folder / LATEST_FILE
    if not path.is_file():
        # A run that was killed before it wrote the file for the first time, or a file that was lost.
        return max(steps_saved(folder), default=None)
    text = path.read_bytes()[:64].decode(errors="replace")
    if not re.fullmatch(r"\d+\n?", text):
        remedy = "write the number of the checkpoint to go on from into it"
        raise CheckpointError(str(path), text, "is no number of a step", remedy)
    step = int(text)
    if not checkpoint_path(folder, step).is_dir():
        others = ", ".join(map(str, steps_saved(folder))) or "none"
        remedy = f"write the number of one that is there ({others}) into it, or use --load-previous-if-damaged"
        raise CheckpointError(str(path), step, f"there is no {checkpoint_path(folder, step).name}", remedy)
    return step


def set_latest(folder: Path, step: int) -> None:
    """Point to the checkpoint to go on from."""
    replace_file(folder / LATEST_FILE, f"{step}\n".encode())


def read_run(path: Path) -> dict[str, Any]:
    """What a (verified) checkpoint says of its run; a file that lies about its fields is refused."""
    file = path / RUN_FILE
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(file), str(error), "is not JSON", "take another checkpoint") from error
    for name, (kind, words) in _FIELDS.items():
        value = content.get(name) if isinstance(content, dict) else None
        if not isinstance(value, kind):
            raise CheckpointError(f"{file}: {name}", value, f"is not {words}", "take another checkpoint")
    if content["format"] != FORMAT:
        remedy = "take the version of megavlm that wrote it"
        raise CheckpointError(f"{file}: format", content["format"], f"is not {FORMAT}", remedy)
    if content["frozen"] is not None and not _FROZEN.fullmatch(content["frozen"]):
        raise CheckpointError(f"{file}: frozen", content["frozen"], "is no such folder", "take another checkpoint")
    return content


def run_bytes(content: Mapping[str, Any]) -> bytes:
    """The file that `read_run` reads."""
    return (json.dumps(content, indent=1) + "\n").encode()


def steps_to_drop(steps: list[int], newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Which checkpoints go when `newest` has been saved; those behind it, of a run that was wound back, stay."""
    if keep_last is None:
        return []
    older = [step for step in sorted(steps) if step <= newest]
    kept = set(older[-keep_last:]) | {step for step in older if keep_every is not None and step % keep_every == 0}
    return [step for step in older if step not in kept]


def drop(folder: Path, keep_last: int | None, keep_every: int | None, newest: int) -> None:
    """Remove old checkpoints, then frozen weights that none of the others refers to."""
    dropped = steps_to_drop(steps_saved(folder), newest, keep_last, keep_every)
    for step in dropped:
        _remove(checkpoint_path(folder, step))
    if not dropped:
        return
    try:
        needed = {read_run(checkpoint_path(folder, step))["frozen"] for step in steps_saved(folder)}
    except (OSError, CheckpointError):
        return  # a checkpoint that cannot say what it needs: nothing is given up
    for item in list(folder.iterdir()):
        if _FROZEN.fullmatch(item.name) and item.name not in needed:
            _remove(item)


def clear_leftovers(folder: Path) -> None:
    """Remove what an interrupted save or removal left behind, and put back what it was about to replace."""
    for item in list(folder.iterdir()) if folder.is_dir() else []:
        match = _LEFTOVER.fullmatch(item.name)
        if not match:
            continue
        if match[2] == "replaced" and not (folder / match[1]).exists():
            item.rename(folder / match[1])
        else:
            shutil.rmtree(item)


def _remove(path: Path) -> None:
    """Under another name first, so that nobody meets half a checkpoint under its own."""
    dropped = path.with_name(f".{path.name}.dropped")
    path.rename(dropped)
    shutil.rmtree(dropped)
