"""Fresh weights that depend on a seed and on each tensor's name alone: every layout starts from the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megavlm.model.state_map import Fresh, StateMap


class FreshWeights:
    """A source of weights like a folder, whose tensors are drawn when they are read."""

    def __init__(self, state_map: StateMap, seed: int, std: float) -> None:
        self._shapes = state_map.folder_shapes()
        self._kinds: dict[str, Fresh] = {source: entry.fresh for entry in state_map.entries for source in entry.theirs}
        self._seed, self._std = seed, std

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        kind, shape = self._kinds[name], self._shapes[name]
        if kind in ("ones", "zeros"):
            return torch.ones(shape) if kind == "ones" else torch.zeros(shape)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        if kind == "linear":
            bound = shape[1] ** -0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        std = {"unit normal": 1.0, "unit length": shape[0] ** -0.5}.get(kind, self._std)
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[:, start:stop]
