"""Random numbers that no version of a library can change: SplitMix64 from a hashed key."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")

_64_BITS = (1 << 64) - 1


class Dice:
    """A stream of draws that is a pure function of its key."""

    def __init__(self, *key: str | int) -> None:
        self._state = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")

    def below(self, count: int) -> int:
        """One of 0 ... count - 1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _64_BITS
        bits = self._state
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _64_BITS
        return ((bits ^ (bits >> 31)) * count) >> 64

    def between(self, least: int, most: int) -> int:
        """One of least ... most; `least` where the two are the wrong way round."""
        return least + self.below(max(1, most - least + 1))

    def pick(self, things: Sequence[T]) -> T:
        """One of these."""
        return things[self.below(len(things))]

    def several(self, things: Sequence[T], count: int) -> list[T]:
        """Different ones of these, in random order."""
        left = list(things)
        return [left.pop(self.below(len(left))) for _ in range(count)]
