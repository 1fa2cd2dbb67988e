"""Sources of weights made of others: a folder with doubled names, and a model put together from parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megavlm.checkpoint.hf_import import WeightSource
from megavlm.errors import WeightsError


class AliasedWeights:
    """A source whose tensors may also stand there under other names, which are checked to hold the same.

    PyTorch stores a module that a model refers to twice under both names. A file may hold both, or either.
    """

    def __init__(self, source: WeightSource, aliases: Mapping[str, str], where: str) -> None:
        held = set(source.names())
        self._source = source
        self._actual = {name: name for name in source.names() if name not in aliases}
        for alias, name in aliases.items():
            if alias not in held:
                continue
            if name not in held:
                self._actual.setdefault(name, alias)
            elif not torch.equal(source.read(alias), source.read(name)):
                raise WeightsError(
                    f"{where}: {alias}", name, "is its other name, and the two differ", "take an undamaged folder"
                )

    def names(self) -> Sequence[str]:
        return list(self._actual)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._actual[name])

    def read(self, name: str) -> Tensor:
        return self._source.read(self._actual[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.read_rows(self._actual[name], start, stop)

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.read_columns(self._actual[name], start, stop)


class ComposedWeights:
    """A model's tensors out of several sources: `parts` says for each name from which, and what it is called there.

    What no part has is fresh. A tensor of `growing` (a vocabulary with new tokens) may lack rows at its end, which
    are fresh, too.
    """

    def __init__(
        self, fresh: WeightSource, parts: Mapping[str, tuple[WeightSource, str]], growing: frozenset[str] = frozenset()
    ) -> None:
        self._fresh, self._parts, self._growing = fresh, parts, growing

    def names(self) -> Sequence[str]:
        return self._fresh.names()

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._growing or name not in self._parts:
            return self._fresh.shape(name)
        source, theirs = self._parts[name]
        return source.shape(theirs)

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._fresh.read(name)
        source, theirs = self._parts[name]
        tensor = source.read(theirs)
        if name in self._growing:
            new = self._fresh.read_rows(name, tensor.size(0), self._fresh.shape(name)[0])
            tensor = torch.cat([tensor, new.to(tensor.dtype)])
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[:, start:stop]
