"""Samples written as real data sets come: LLaVA's json with a folder of images, img2dataset's tars, OBELICS' lists."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from megavlm.data.sample import IMAGE_TAG, Sample
from megavlm.errors import DataError

_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def write_llava(samples: Iterable[Sample], folder: str | Path) -> Path:
    """`data.json` and `images/` in the folder; a caption becomes the answer to its bare picture. Returns the json."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries = [_llava_entry(sample, folder) for sample in samples]
    path = folder / "data.json"
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return path


def _llava_entry(sample: Sample, folder: Path) -> dict[str, Any]:
    names = []
    for number, file in enumerate(_files(sample)):
        names.append(f"images/{sample.id}-{number}.{_suffix(file)}")
        (folder / names[-1]).write_bytes(file)
    turns = [{"from": _SPEAKERS[turn.role], "value": turn.text} for turn in sample.turns]
    if not turns:
        turns = [{"from": "human", "value": IMAGE_TAG}, {"from": "gpt", "value": _caption(sample)}]
    image = {"image": names[0] if len(names) == 1 else names} if names else {}
    return {"id": sample.id, **image, "conversations": turns}


def write_img2dataset(samples: Iterable[Sample], folder: str | Path, samples_per_tar: int = 1000) -> list[Path]:
    """Tars of pictures with their captions (`.txt`) and `.json`, each member named by its number. Returns the tars."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    left, tars = iter(samples), list[Path]()
    while chunk := list(islice(left, samples_per_tar)):
        tars.append(folder / f"{len(tars):05d}.tar")
        with tarfile.open(tars[-1], "w") as tar:
            for number, sample in enumerate(chunk):
                _add_pair(tar, f"{len(tars) - 1:05d}{number:04d}", sample)
    return tars


def _add_pair(tar: tarfile.TarFile, key: str, sample: Sample) -> None:
    (file,), text = _files(sample), _caption(sample)
    about = {"key": key, "caption": text, "url": f"toy://{sample.id}", "status": "success"}
    members = {_suffix(file): file, "json": json.dumps(about).encode(), "txt": text.encode()}
    for suffix, content in members.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")  # owner and time stay those of nobody: the same bytes every time
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def obelics_lists(sample: Sample) -> tuple[list[bytes | None], list[str | None]]:
    """A document as OBELICS has it: two lists of which exactly one holds something at each place."""
    images: list[bytes | None] = []
    texts: list[str | None] = []
    files = iter(_files(sample))
    for number, text in enumerate(sample.text.split(IMAGE_TAG)):
        if number:
            images.append(next(files))
            texts.append(None)
        if text.strip():
            images.append(None)
            texts.append(text.strip())
    return images, texts


def _files(sample: Sample) -> list[bytes]:
    return [file for picture in sample.pictures for file in picture.files]


def _caption(sample: Sample) -> str:
    """The text behind a document's one picture."""
    before, tag, text = sample.text.partition(IMAGE_TAG)
    if before or not tag or IMAGE_TAG in text:
        problem = "is neither a conversation nor one picture with its caption behind it"
        raise DataError("sample", sample.id, problem, "write documents in another format")
    return text


def _suffix(file: bytes) -> str:
    return "png" if file.startswith(b"\x89PNG") else "jpg"
