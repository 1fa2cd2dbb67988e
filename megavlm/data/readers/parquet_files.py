"""Parquet files as entries: one record a row, read row group by row group, a few rows at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megavlm.data.readers.base import Bad, Container, Entry, ReadOptions, Record
from megavlm.errors import DataError

ROWS_AT_A_TIME = 16
_BUFFER = 1 << 20


def entries(path: Path, options: ReadOptions) -> Iterator[Entry]:
    """The rows of a file; a row group is opened when the first of its rows is loaded."""
    with opened(path) as file:
        for group in range(file.metadata.num_row_groups):
            rows = _Rows(file, group)
            for row in range(file.metadata.row_group(group).num_rows):
                yield functools.partial(rows.load, row)


def count(path: Path, options: ReadOptions) -> int:
    """How many rows there are, by the file's own word."""
    with opened(path) as file:
        return int(file.metadata.num_rows)


PARQUET = Container(entries, count, (".parquet",))


def opened(path: Path) -> pq.ParquetFile:
    """The file, its metadata read."""
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = f"is no parquet file: {_one_line(error)}"
        raise DataError("source", str(path), problem, "copy it again, or leave it out") from None


class _Rows:
    """The rows of one row group, loaded in their order."""

    def __init__(self, file: pq.ParquetFile, group: int) -> None:
        self._file, self._group = file, group
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._batch: pa.RecordBatch | None = None
        self._first = 0

    def load(self, row: int) -> Record:
        try:
            while self._batch is None or row >= self._first + self._batch.num_rows:
                self._first += 0 if self._batch is None else self._batch.num_rows
                self._batch = next(self._all_batches())
            found = self._batch.slice(row - self._first, 1).to_pylist()[0]
        except StopIteration:
            raise Bad("parquet damaged: fewer rows than its metadata says") from None
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise Bad(f"parquet damaged: {_one_line(error)}") from None
        return dict(found)

    def _all_batches(self) -> Iterator[pa.RecordBatch]:
        if self._batches is None:
            self._batches = self._file.iter_batches(ROWS_AT_A_TIME, row_groups=[self._group], use_threads=False)
        return self._batches


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
