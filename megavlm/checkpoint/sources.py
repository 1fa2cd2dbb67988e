"""Sources of weights made of others: doubled names, a vocabulary that grew, a model put together from parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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


class GrownWeights:
    """A source whose tensors of these names have rows added at their end until they are so many.

    Each new row is the mean of the old ones: as an output its logit is never the largest, so what a model says does not
    change.
    """

    def __init__(self, source: WeightSource, names: Collection[str], rows: int) -> None:
        self._source, self._names, self._rows = source, names, rows

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        return (self._rows, *shape[1:]) if name in self._names else shape

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        missing = self.shape(name)[0] - tensor.size(0) if name in self._names else 0
        if not missing:
            return tensor
        mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(missing, -1)])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[:, start:stop]


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
