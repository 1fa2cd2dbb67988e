"""The papers' data sets as sources of a run: the catalog's folder names, with the published sizes as weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from megavlm.build.run_config import SourceConfig
from megavlm.data.catalog import CatalogEntry, entries_of


def published(stage: str, kinds: Collection[str] = ()) -> list[CatalogEntry]:
    """The data sets of `RECIPE/stage`, or those of some types."""
    return [entry for entry in entries_of(stage) if not kinds or entry.type in kinds]


def published_samples(entries: Collection[CatalogEntry]) -> int:
    """Samples of data sets whose sizes are published."""
    return sum(entry.samples or 0 for entry in entries)


def weighted_by_size(
    entries: Collection[CatalogEntry], unpublished: Mapping[str, int] | None = None
) -> tuple[SourceConfig, ...]:
    """An endless blend in which each data set counts by its samples; `unpublished` has sizes by folder name."""
    sizes = {entry.slug: entry.samples or (unpublished or {})[entry.slug] for entry in entries}
    return tuple(SourceConfig(name=name, weight=size) for name, size in sizes.items())


def in_one_pass(entries: Collection[CatalogEntry], part: int = 0, parts: int = 1) -> tuple[SourceConfig, ...]:
    """Each sample of each data set once, or of one of their disjoint random parts."""
    return tuple(SourceConfig(name=entry.slug, epochs=1, part=part, parts=parts) for entry in entries)
