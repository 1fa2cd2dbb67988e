"""Mixtures in LLaVA's form: data sets by file, and which of their records are taken.

    datasets:
      - json_path: llava_v1_5_mix665k.json
        sampling_strategy: first:50%

Each entry may also say its `format` and the folder of its `images`. Relative paths start from the mixture's own folder,
or where there is no such file from the current one, as LLaVA has them.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megavlm.config import Config, require

_STRATEGY = re.compile(r"all|(first|end|random):(\d+)(%?)")


@dataclass(frozen=True, kw_only=True)
class MixtureEntry(Config):
    """One data set of a mixture."""

    json_path: str
    """A file or a folder, in whatever format."""
    sampling_strategy: str = "all"
    """all, first:N, end:N or random:N, with N a number of records or, as in 50%, a share of them (rounded up)."""
    format: str | None = None
    """The format, where looking inside does not tell it."""
    images: str | None = None
    """Folder that the names of pictures start from, where it is another than the command's."""

    def check(self) -> None:
        fits = _STRATEGY.fullmatch(self.sampling_strategy)
        require(
            fits is not None and not (fits[3] == "%" and int(fits[2]) > 100),
            self,
            "sampling_strategy",
            "is no strategy",
            "use all, first:N, end:N or random:N, with N a count or a share such as 50%",
        )


@dataclass(frozen=True, kw_only=True)
class Mixture(Config):
    """What a `--recipe` file says."""

    datasets: tuple[MixtureEntry, ...]
    """The data sets, in their order."""

    def check(self) -> None:
        require(len(self.datasets) > 0, self, "datasets", "is empty", "list `- json_path: FILE` for each data set")


def load_mixture(path: str) -> Mixture:
    """The mixture in a file, its paths resolved."""
    mixture = Mixture.load(path)
    folder = Path(path).parent
    entries = []
    for entry in mixture.datasets:
        images = None if entry.images is None else _resolved(entry.images, folder)
        entries.append(entry.replace(json_path=_resolved(entry.json_path, folder), images=images))
    return mixture.replace(datasets=tuple(entries))


def _resolved(name: str, folder: Path) -> str:
    return str(folder / name) if (folder / name).exists() else name


def chosen(strategy: str, total: int, name: str, seed: int) -> range | NDArray[np.int64]:
    """The numbers of the records that a strategy takes of so many, in their order.

    A random choice depends on the seed and the data set's name, so that another entry does not change it.
    """
    match = _STRATEGY.fullmatch(strategy)
    assert match is not None, strategy
    if match[1] is None:
        return range(total)
    number = math.ceil(int(match[2]) * total / 100) if match[3] else int(match[2])
    number = min(number, total)
    if match[1] == "first":
        return range(number)
    if match[1] == "end":
        return range(total - number, total)
    key = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(key[:16], "big")))
    return np.sort(generator.choice(total, number, replace=False)).astype(np.int64)
