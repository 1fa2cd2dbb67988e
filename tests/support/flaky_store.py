"""An object store in memory that fails as often as it is told to, beside fsspec's own `memory://`."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FlakyFileSystem(MemoryFileSystem):
    """`flaky://`: the files of `memory://`; the next reads fail, or give less than is there."""

    protocol = "flaky"
    cachable = False  # codespell:ignore cachable
    failures: list[str] = []  # noqa: RUF012  (of all instances)
    """How the next reads fail: `error`, or `short`."""
    reads: list[tuple[int, int]] = []  # noqa: RUF012
    """(start, end) of all reads."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("flaky://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        assert start is not None and end is not None
        self.reads.append((start, end))
        failure = self.failures.pop() if self.failures else ""
        if failure == "error":
            raise RuntimeError("503 Slow Down")
        data: bytes = super().cat_file(path, start, end, **kwargs)
        return data[: len(data) // 2] if failure == "short" else data


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
