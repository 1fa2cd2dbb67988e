"""Tars as others write them, and as an attacker would."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

Member = tuple[str, bytes] | tarfile.TarInfo


def write_tar(path: Path, members: Sequence[Member], kind: int = tarfile.PAX_FORMAT) -> None:
    """A tar of files, given as (name, content), and of members without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size, info.mtime = len(member[1]), 1700000000.5  # webdataset's writer gives fractions: PAX headers
            tar.addfile(info, io.BytesIO(member[1]))


def chat(question: str, answer: str = "Yes.") -> bytes:
    """A conversation in LLaVA's form."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns}).encode()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info
