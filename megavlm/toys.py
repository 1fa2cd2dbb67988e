"""What a toy run of the launch scripts needs, made where it is absent: data sets, and weights or a tokenizer."""

from __future__ import annotations

from pathlib import Path

from megavlm.checkpoint.atomic import atomic_folder
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG
from megavlm.data.toy_world.world import SampleKind
from megavlm.toy.bases import infimm_base
from megavlm.toy.data import prepare_toy_data
from megavlm.toy.tokenizer import toy_words, write_tokenizer

SAMPLES: dict[SampleKind, int] = {"pairs": 1200, "documents": 300, "chat": 2400, "multi_image": 300, "text": 300}
"""Enough to see a run learn, made in a few seconds; `make quickstart` takes more."""


def make_toys(family: str, folder: Path, data_path: str | None, is_first: bool) -> list[str]:
    """The options of `megavlm train` that name them; only the first process makes what is absent."""
    data = Path(data_path) if data_path else folder / "data"
    base = folder / ("base" if family == "infimm" else "tokenizer")
    if is_first and not base.is_dir():
        if family == "infimm":
            infimm_base(base)
        else:
            with atomic_folder(base) as staging:
                write_tokenizer(staging)
    if is_first:
        prepare_toy_data(data, base, family=family, samples=SAMPLES)
    return ["--data-path", str(data), *(["--load-hf", str(base)] if family == "infimm" else _tokenizer(base))]


def _tokenizer(folder: Path) -> list[str]:
    """The toy tokenizer is the same for both families, and its numbers of tags are not those of the recipe."""
    words = toy_words()
    tags = {"image_token_id": words.token_of(IMAGE_TAG), "video_token_id": words.token_of(VIDEO_TAG)}
    return ["--tokenizer", str(folder), *(f"aquila_vl.{name}={token}" for name, token in tags.items())]
