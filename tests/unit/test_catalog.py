"""The catalog of data sets: its sums are those the papers print, and folders are held against it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megavlm.data.catalog import (
    CATALOG,
    INFIMM_MULTITASK,
    INFIMM_PRETRAIN,
    INFINITY_PARTS,
    INFINITY_SOURCES,
    CatalogEntry,
    check,
    entries_of,
    prepared_counts,
    table_of,
)
from megavlm.data.readers.registry import READERS
from megavlm.errors import ConfigError


def total(entries: list[CatalogEntry]) -> int:
    return sum(entry.samples or 0 for entry in entries)


def by_type(entries: list[CatalogEntry], kind: str) -> list[CatalogEntry]:
    return [entry for entry in entries if entry.type == kind]


def test_sums_are_those_of_the_tables() -> None:
    assert total(INFIMM_PRETRAIN) == 667_000_000
    assert total(by_type(INFIMM_MULTITASK, "caption")) == 630_000
    assert total(by_type(INFIMM_MULTITASK, "general VQA")) == 994_000
    assert total(by_type(INFIMM_MULTITASK, "text-oriented VQA")) == 271_000
    assert total(INFIMM_MULTITASK) == 1_895_000
    stages = [total([entry for entry in INFINITY_PARTS if entry.stages == (stage,)]) for stage in "1234"]
    assert stages == [10_000_000, 24_400_000, 6_000_000, 3_000_000]
    assert total(INFINITY_PARTS) == 43_400_000
    assert round(total(INFINITY_SOURCES) / 1e6, 1) == 43.2


def test_entries_are_complete() -> None:
    assert len({entry.slug for entry in CATALOG}) == len(CATALOG)
    assert {entry.reader for entry in CATALOG} <= READERS.keys()
    assert (len(INFIMM_PRETRAIN), len(INFIMM_MULTITASK), len(INFINITY_PARTS), len(INFINITY_SOURCES)) == (6, 13, 13, 21)
    assert all(entry.used_in == "not published" for entry in INFINITY_SOURCES)


def names(stage: str) -> list[str]:
    return [entry.name for entry in entries_of(stage)]


def test_stages_name_their_data_sets() -> None:
    assert names("infimm-llama2-13b/pretrain") == ["OBELICS", "MMC4", "LAION", "COYO", "LAION-COCO", "PMD"]
    assert "PMD" not in names("infimm-zephyr-7b/pretrain")
    assert names("infimm-zephyr-7b/finetune") == ["LLaVA-665k"]
    assert "ScienceQA-image" in names("infimm/multitask")
    assert names("aquila-vl-2b/2a") == names("aquila-vl-2b/2c")
    assert len(names("aquila-vl-2b/2a")) == 5
    assert len(names("aquila-vl-2b")) == 13
    for stage in ("infimm/stage9", "llava/pretrain", "aquila-vl/2"):
        with pytest.raises(ConfigError, match="use one of infimm/pretrain"):
            entries_of(stage)


def test_what_is_there_is_held_against_the_printed_size() -> None:
    obelics, mmc4, laion, *_ = entries_of("infimm/pretrain")
    counts = {"obelics": 100_500_000, "mmc4": 52_499_999}
    assert [(finding.state, finding.samples) for finding in check([obelics, mmc4, laion], counts)] == [
        ("present", 100_500_000),
        ("differs in count", 52_499_999),
        ("missing", None),
    ]
    science = [entry for entry in CATALOG if entry.name == "ScienceQA-image"]
    assert check(science, {"scienceqa-image": 5})[0].state == "of unknown size"
    general = next(entry for entry in INFINITY_PARTS if entry.size == "7.1M")
    assert [check([general], {general.slug: n})[0].state for n in (7_050_000, 7_049_999, 7_150_001)] == [
        "present",
        "differs in count",
        "differs in count",
    ]


def test_prepared_folders_say_their_counts(tmp_path: Path) -> None:
    for name, content in (("OBELICS", {"samples": 101_000_000}), ("other", {"samples": 3})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(json.dumps(content))
    counts = prepared_counts(tmp_path)
    assert counts == {"obelics": 101_000_000, "other": 3}
    line = table_of(check(entries_of("infimm/pretrain"), counts)).splitlines()[1]
    assert line.split() == [
        "OBELICS",
        "obelics",
        "101M",
        "101,000,000",
        "present",
        "obelics",
        "pretrain",
        "InfiMM",
        "table",
        "1",
    ]
    (tmp_path / "other" / "dataset.json").write_text('{"samples": "3"}')
    with pytest.raises(ConfigError, match="megavlm data index"):
        prepared_counts(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        prepared_counts(tmp_path / "gone")
