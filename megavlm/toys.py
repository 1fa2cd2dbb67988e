"""What a toy run of the launch scripts needs, made where it is absent: data sets and weights."""

from __future__ import annotations

from pathlib import Path

from megavlm.data.toy_world.world import SampleKind
from megavlm.toy.bases import FAMILY_BASES
from megavlm.toy.data import prepare_toy_data

SAMPLES: dict[SampleKind, int] = {"pairs": 1200, "documents": 300, "chat": 2400, "multi_image": 300, "text": 300}
"""Enough to see a run learn, made in a few seconds; `make quickstart` takes more."""


def make_toys(family: str, folder: Path, data_path: str | None, is_first: bool) -> list[str]:
    """The options of `megavlm train` that name them; only the first process makes what is absent."""
    data = Path(data_path) if data_path else folder / "data"
    base = folder / "base"
    if is_first and not base.is_dir():
        FAMILY_BASES[family](base, 1234)
    if is_first:
        prepare_toy_data(data, base, family=family, samples=SAMPLES)
    return ["--data-path", str(data), "--load-hf", str(base)]
