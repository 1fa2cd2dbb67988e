"""Tars of every kind, and what stands in the files by which Energon opens them.

`tests/fixtures/energon_7.4.1.json` is what `energon prepare` makes of these tars. Where megatron-energon is installed,
running this file writes it anew.
"""

from __future__ import annotations

import base64
import json
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from foreign_tars import Member, chat, special, write_tar

from megavlm.data.shards import ShardWriter

REFERENCE = Path(__file__).parents[1] / "fixtures" / "energon_7.4.1.json"
GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")


def write_tars(folder: Path) -> None:
    """Shards of others (long names, folders, notes, links, what our index refuses) and one of ours."""
    kinds = {"a.tar": tarfile.PAX_FORMAT, "sub/b.c.tar": tarfile.GNU_FORMAT, "x é.tar": tarfile.PAX_FORMAT}
    for number, (name, kind) in enumerate(kinds.items()):
        members: list[Member] = [special("folder", tarfile.DIRTYPE)]
        for sample in range(4):
            members += _sample(f"{'dir.x/' * number}k{number}{sample}", sample)
        write_tar(folder / name, members, kind)
    with ShardWriter(folder / "shard-00000.tar") as writer:
        for sample in range(3):
            parts = [("json", chat("<image>" * sample)), *((f"{place}.gif", GIF) for place in range(sample))]
            writer.add(f"000000-00000{sample}", parts)


def _sample(key: str, number: int) -> list[Member]:
    """A good sample, and behind it something odd."""
    odd: list[list[Member]] = [
        [("long/" * 30 + f"{'é' * 30}{key}.json", chat("a long name"))],
        [(f"{key}-bad.json", b"nonsense"), special(f"{key}.link.gif", tarfile.SYMTYPE, "/etc/passwd")],
        [(f".{key}.json", chat("hidden")), ("__notes__/a.json", b"{}"), (f"{{a,b}}{key}.gif", GIF)],
        [("no-ending", b"x"), (f"z/__{key}__.json", chat("a note, to us"))],
    ]
    return [(f"{key}.json", chat("<image>?")), (f"{key}.GIF", GIF), (f"{key}.txt", b"more"), *odd[number]]


def files_in(folder: Path) -> dict[str, Any]:
    """What stands in the files of Energon, but for the id."""
    meta = folder / ".nv-meta"
    with closing(sqlite3.connect(meta / "index.sqlite")) as database:
        schema = database.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        tables = {
            name: [list(row) for row in database.execute(f"SELECT * FROM {name} ORDER BY 1, {order}")]
            for name, order in (("samples", 3), ("sample_parts", 4))
        }
    offsets = {
        path.relative_to(folder).as_posix(): np.fromfile(path, "<u8").tolist() for path in folder.rglob("*.tar.idx")
    }
    return {
        "schema": {name: sql and re.sub(r"\s+", "", sql) for name, sql in schema},
        **tables,
        "offsets": dict(sorted(offsets.items())),
        "info": json.loads((meta / ".info.json").read_text()),
        "dataset": (meta / "dataset.yaml").read_text(),
    }


def energon_prepare(folder: Path) -> None:
    """Energon's own command."""
    command = [str(Path(sys.executable).with_name("energon")), "prepare", "--non-interactive", "--num-workers", "1"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write_tars(Path(name))
        energon_prepare(Path(name))
        REFERENCE.write_text(json.dumps(files_in(Path(name)), ensure_ascii=False) + "\n")
