"""From what a run trains on to what it is evaluated on: the held-out data of the same sources, as an endless stream."""

from __future__ import annotations

from pathlib import Path

from megavlm.data.index import DATASET_FILE, Index
from megavlm.data.order import SourceConfig
from megavlm.data.step_plan import DataConfig
from megavlm.errors import DataError


def held_out_data(data: DataConfig) -> DataConfig:
    """The same streams over `valid_path`, without the sources that have nothing there, and without limits and parts."""
    assert data.valid_path is not None
    folder = Path(data.valid_path)
    streams = []
    for stream in data.streams:
        sources = tuple(_source(source, folder) for source in stream.sources if _is_there(source, folder))
        if sources:
            streams.append(stream.replace(sources=sources))
    if not streams:
        problem = "holds a prepared data set of none of the run's sources"
        names = ", ".join(source.name for stream in data.streams for source in stream.sources)
        raise DataError("--valid-data-path", data.valid_path, problem, f"prepare held-out data below it, of: {names}")
    return data.replace(path=data.valid_path, valid_path=None, streams=tuple(streams))


def _is_there(source: SourceConfig, folder: Path) -> bool:
    return (folder / source.name / DATASET_FILE).is_file()


def _source(source: SourceConfig, folder: Path) -> SourceConfig:
    """In the share that it has in training; where epochs say that, in proportion to what is held out."""
    weight = source.weight or float(source.samples or 0)
    if source.epochs is not None:
        weight = source.epochs * len(Index.open(folder / source.name))
    return SourceConfig(name=source.name, weight=weight)
