"""Small files in the formats that people have, made from random pictures and words."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megavlm.data.readers.base import ReadOptions
from megavlm.data.readers.registry import read
from megavlm.data.sample import Refusal, Sample

END_OF_TAR = 2 * tarfile.BLOCKSIZE


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    """A file of random pixels."""
    generator = random.Random(seed)
    image = Image.frombytes("RGB", size, generator.randbytes(3 * size[0] * size[1]))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def big_picture(seed: int) -> bytes:
    """A file of more than 11 kB: noise does not compress."""
    return picture(seed, "PNG", (80, 60))


def write_pictures(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Pictures under these names; returns their bytes."""
    content = {name: picture(index) for index, name in enumerate(names)}
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return content


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def llava_record(name: str, image: Any = None, question: str = "What?", answer: str = "A thing.") -> dict[str, Any]:
    front = "" if image is None else "<image>\n" * (len(image) if isinstance(image, list) else 1)
    turns = [{"from": "human", "value": front + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **({} if image is None else {"image": image})}


def read_all(path: Path, name: str, **options: Any) -> tuple[list[Sample], list[Refusal]]:
    """What a reader makes of a file."""
    found = list(read(path, name, ReadOptions(**options)))
    samples = [item for item in found if isinstance(item, Sample)]
    return samples, [item for item in found if isinstance(item, Refusal)]
