"""Which layers of a chunk a trace runs: the first, the last, and one of each kind between, which stands for all of it.

Layers of one kind hold and do the same, so what many of them add up to follows from one. Where recompute works on units
of several layers, units are told apart instead.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import nn

from megavlm.plan.places import BEFORE, BEHIND


@dataclass(frozen=True)
class Chosen:
    """The layers that are traced."""

    layers: tuple[int, ...]
    """Ascending."""
    times: dict[int, int]
    """First layer of each traced unit -> how many units it stands for."""
    unit: int
    """Layers of a unit."""

    @property
    def starts(self) -> tuple[int, ...]:
        """The first layer of each traced unit."""
        return tuple(sorted({self.unit_of(layer) for layer in self.layers}))

    def standing_for(self, other: Chosen) -> Chosen:
        """These layers, standing for as many as another chunk's, which are of the same kinds in the same order."""
        pairs = zip(self.starts, other.starts, strict=True)
        return Chosen(self.layers, {own: other.times[its] for own, its in pairs if its in other.times}, self.unit)

    def unit_of(self, layer: int) -> int:
        """The first layer of the unit that a layer belongs to; BEFORE and BEHIND stay what they are."""
        return layer if layer in (BEFORE, BEHIND) else layer // self.unit * self.unit

    def times_of(self, layer: int) -> int:
        """How often what happens in a layer happens."""
        return self.times.get(self.unit_of(layer), 1)


def choose(layers: Sequence[nn.Module], unit: int | None) -> Chosen:
    """Of a chunk's layers; `unit` is how many are recomputed at once, None: no layer stands for another."""
    return choose_of_kinds([_kind(layer) for layer in layers], unit)


def choose_of_kinds(of_layers: Sequence[Hashable], unit: int | None) -> Chosen:
    """The same, where the kind of each layer is known."""
    if unit is None or len(of_layers) % unit:
        return Chosen(tuple(range(len(of_layers))), {}, 1)
    starts = range(0, len(of_layers), unit)
    kinds = [tuple(of_layers[start : start + unit]) for start in starts]
    first_of: dict[Hashable, int] = {}
    times: dict[int, int] = {}
    for place in range(1, len(kinds) - 1):
        start = starts[first_of.setdefault(kinds[place], place)]
        times[start] = times.get(start, 0) + 1
    units = sorted({0, len(kinds) - 1, *first_of.values()}) if kinds else []
    return Chosen(tuple(starts[one] + number for one in units for number in range(unit)), times, unit)


def _kind(layer: nn.Module) -> Hashable:
    """Two layers of one kind have parameters of the same names, shapes, and say in training."""
    return tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
