"""How the weights of a Hugging Face folder make ours: the vocabulary of the families' declarative tables.

A row of a table names one parameter of ours, the tensors of the folder that it is made of, and how it is cut over the
tensor-parallel ranks. `checkpoint` reads the table from right to left, `export` from left to right; neither knows a
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

Split = Literal["whole", "rows", "columns"]
Order = Literal["one after another", "by query group", "by rank", "halves by rank"]
Fresh = Literal["normal", "unit normal", "unit length", "linear", "ones", "zeros"]
"""How a tensor is drawn: normal with the run's standard deviation, with 1, or with 1 / sqrt(its size); as torch draws a
Linear's weight (uniform within 1 / sqrt(its columns)); or not at all."""


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the tensors it is made of; `{i}` in all names stands for the layer."""

    ours: str
    theirs: Mapping[str, str]
    """Name in the folder -> shape in letters that the family defines, for example `F H`."""
    split: Split = "whole"
    """Whether every rank holds it whole, or a slice of its rows or of its columns."""
    order: Order = "one after another"
    """How rows are laid: tensors as they come, by query group (q, k, v), by rank (gate, up), or the two halves of one
    tensor by rank (keys and values)."""
    padded: bool = False
    """Whether zero rows follow so that it divides over the ranks (the vocabulary)."""
    flattened: bool = False
    """Whether ours is a matrix where theirs has more dimensions: all behind the first in one (a convolution)."""
    fresh: Fresh = "normal"
    """What it holds before training when there is no folder."""

    def for_layer(self, layer: int) -> Entry:
        """The same entry with the layer's number filled in."""
        theirs = {name.replace("{i}", str(layer)): shape for name, shape in self.theirs.items()}
        return replace(self, ours=self.ours.replace("{i}", str(layer)), theirs=theirs)

    def under(self, ours: str, theirs: str) -> Entry:
        """The same entry with a prefix before our name and another before the folder's."""
        return replace(self, ours=ours + self.ours, theirs={theirs + name: s for name, s in self.theirs.items()})


@dataclass(frozen=True)
class Block:
    """`count` consecutive rows of the tensor `source`, from its row `start`."""

    source: str
    start: int
    count: int


@dataclass(frozen=True)
class StateMap:
    """A family's table for one model: its rows, what its letters mean, and how many query groups there are."""

    entries: tuple[Entry, ...]
    sizes: Mapping[str, int]
    query_groups: int
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that a folder may hold beside its weights although the config decides them: name -> what it must be."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second names under which a folder may hold a tensor as well: second name -> name."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a folder may hold beside its weights although they repeat others: name -> which it must equal."""
    rows_apart: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Parameters of ours that take the place of rows of a frozen one: name -> (the frozen one's, which rows)."""

    def shape(self, entry: Entry, source: str) -> tuple[int, ...]:
        """The shape that the folder's tensor `source` must have."""
        return tuple(self.sizes[letter] for letter in entry.theirs[source].split())

    def blocks(self, entry: Entry, tensor_parallel: int) -> list[Block]:
        """The rows of our whole parameter from top to bottom; an even cut gives each rank its own."""
        rows = {source: self.shape(entry, source)[0] for source in entry.theirs}
        if entry.order == "halves by rank":
            ((source, count),) = rows.items()
            piece = count // 2 // tensor_parallel
            return [
                Block(source, half * (count // 2) + rank * piece, piece)
                for rank in range(tensor_parallel)
                for half in (0, 1)
            ]
        pieces = {"one after another": 1, "by query group": self.query_groups, "by rank": tensor_parallel}[entry.order]
        return [
            Block(source, piece * (count // pieces), count // pieces)
            for piece in range(pieces)
            for source, count in rows.items()
        ]

    def folder_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the folder must hold."""
        return {source: self.shape(entry, source) for entry in self.entries for source in entry.theirs}


def merged(*maps: StateMap) -> StateMap:
    """One table for a model of several parts; the first part's query groups are the decoder's."""
    sizes: dict[str, int] = {}
    for part in maps:
        assert all(sizes.get(letter, size) == size for letter, size in part.sizes.items()), "a letter means two sizes"
        sizes |= part.sizes
    return StateMap(
        entries=tuple(entry for part in maps for entry in part.entries),
        sizes=sizes,
        query_groups=maps[0].query_groups,
        constants={name: table for part in maps for name, table in part.constants.items()},
        aliases={alias: name for part in maps for alias, name in part.aliases.items()},
        copies={copy: name for part in maps for copy, name in part.copies.items()},
        rows_apart={name: rows for part in maps for name, rows in part.rows_apart.items()},
    )


def expand_layers(entries: Sequence[Entry], num_layers: int) -> tuple[Entry, ...]:
    """The table with one row a layer in place of each row with `{i}`; layers stay together, in order."""
    before = [entry for entry in entries if "{i}" not in entry.ours]
    layered = [entry for entry in entries if "{i}" in entry.ours]
    return (*before, *(entry.for_layer(i) for i in range(num_layers) for entry in layered))
