"""Every data set of the two papers: how large, of what kind, read by what, used where.

InfiMM's tables 1 and 2 and its instruction set, and Infinity-MM's tables 1 (parts of the stages) and 7 (sources). The
two tables of Infinity-MM describe the same samples in two ways, and say not which source went into which stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from megavlm.errors import ConfigError

NOT_PUBLISHED = "not published"
INFINITY_STAGES = ("1", "2", "3", "4")
Table = Literal["InfiMM table 1", "InfiMM table 2", "InfiMM model card", "InfiMM section IFT", "Infinity-MM table 1",
                "Infinity-MM table 7"]  # fmt: skip


@dataclass(frozen=True)
class CatalogEntry:
    """One data set, or one part of a stage."""

    name: str
    size: str
    """Samples as they are printed: 101M, 443k; or 'not published'."""
    type: str
    language: str
    reader: str
    """The --format that reads it."""
    stages: tuple[str, ...]
    """Stages that use it; none where that is not published."""
    source: Table
    """Where the number stands."""
    only_for: str = ""
    """The models that use it, where not all do."""

    @property
    def slug(self) -> str:
        """Its name as a folder."""
        words = "".join(char if char.isalnum() else " " for char in self.name.lower())
        return "-".join(words.split())

    @property
    def samples(self) -> int | None:
        """The size as a number."""
        return None if self.size == NOT_PUBLISHED else round(_number(self.size) * _unit(self.size))

    @property
    def tolerance(self) -> float:
        """Half of the last digit printed: what rounding hides."""
        decimals = len(self.size[:-1].partition(".")[2])
        return 0.5 * _unit(self.size) / 10**decimals

    @property
    def used_in(self) -> str:
        """The stages in words."""
        return ", ".join(self.stages) or NOT_PUBLISHED


def _number(size: str) -> float:
    return float(size.rstrip("kM"))


def _unit(size: str) -> int:
    return {"k": 1_000, "M": 1_000_000}.get(size[-1], 1)


def _infimm(table: Table, stage: str, rows: Iterable[tuple[str, str, str, str]]) -> list[CatalogEntry]:
    return [CatalogEntry(name, size, kind, "en", reader, (stage,), table) for name, size, kind, reader in rows]


INFIMM_PRETRAIN = [
    *_infimm(
        "InfiMM table 1",
        "pretrain",
        [
            ("OBELICS", "101M", "interleaved documents", "obelics"),
            ("MMC4", "53M", "interleaved documents", "mmc4"),
            ("LAION", "115M", "pairs", "img2dataset"),
            ("COYO", "238M", "pairs", "img2dataset"),
            ("LAION-COCO", "140M", "pairs", "img2dataset"),
        ],
    ),
    CatalogEntry("PMD", "20M", "pairs", "en", "img2dataset", ("pretrain",), "InfiMM table 1", only_for="13B"),
]
INFIMM_MULTITASK = _infimm(
    "InfiMM table 2",
    "multitask",
    [
        ("COCO Caption", "410k", "caption", "vqa"),
        ("TextCaps", "110k", "caption", "vqa"),
        ("VizWiz Caption", "110k", "caption", "vqa"),
        ("VQAv2", "443k", "general VQA", "vqa"),
        ("OKVQA", "9k", "general VQA", "vqa"),
        ("VizWiz VQA", "20k", "general VQA", "vqa"),
        ("GQA", "471k", "general VQA", "vqa"),
        ("A-OKVQA", "17k", "general VQA", "vqa"),
        ("TextVQA", "34k", "general VQA", "vqa"),
        ("OCRVQA", "166k", "text-oriented VQA", "vqa"),
        ("STVQA", "26k", "text-oriented VQA", "vqa"),
        ("DocVQA", "63k", "text-oriented VQA", "vqa"),
        ("LLaVAR", "16k", "text-oriented VQA", "llava"),
    ],
)
INFIMM_CARD = _infimm(
    "InfiMM model card", "multitask", [("ScienceQA-image", NOT_PUBLISHED, "general VQA", "vqa")]
)  # fmt: skip
INFIMM_INSTRUCT = _infimm("InfiMM section IFT", "finetune", [("LLaVA-665k", "665k", "conversations", "llava")])


def _part(stage: str, name: str, size: str, kind: str) -> CatalogEntry:
    return CatalogEntry(name, size, kind, "en, zh", "infinity-mm", (stage,), "Infinity-MM table 1")


INFINITY_PARTS = [
    _part("1", "Infinity-MM caption", "10M", "image-caption"),
    _part("2", "Infinity-MM general", "7.1M", "general visual instruction"),
    _part("2", "Infinity-MM general OCR", "2.6M", "general visual instruction"),
    _part("2", "Infinity-MM doc/chart/screen", "5.8M", "general visual instruction"),
    _part("2", "Infinity-MM math/reasoning", "1.3M", "general visual instruction"),
    _part("2", "Infinity-MM text instruct", "7.6M", "general visual instruction"),
    _part("3", "Infinity-MM LLaVA-OneVision", "3.5M", "selective visual instruction"),
    _part("3", "Infinity-Instruct subjective part", "1.3M", "selective visual instruction"),
    _part("3", "Infinity-MM Docmatix", "1.2M", "selective visual instruction"),
    _part("4", "Infinity-MM GPT-4-generated", "1.7M", "GPT-4 and synthetic"),
    _part("4", "Infinity-MM synthetic", "0.8M", "GPT-4 and synthetic"),
    _part("4", "Infinity-MM task-specific", "0.4M", "GPT-4 and synthetic"),
    _part("4", "Infinity-Preference", "0.1M", "GPT-4 and synthetic"),
]
DOCUMENTS, MIXED = "doc/chart/screen", "general, OCR, math, doc, text"
INFINITY_SOURCES = [
    CatalogEntry(name, size, kind, NOT_PUBLISHED, reader, (), "Infinity-MM table 7")
    for name, size, kind, reader in [
        ("Emu2", "10M", "caption", "infinity-mm"),
        ("LVIS-Instruct", "223k", "general", "llava"),
        ("LLaVA-CC3M-Pretrain-595K", "595k", "general", "llava"),
        ("VisDial", "116k", "general", "infinity-mm"),
        ("ShareGPT4(V)", "3.2M", "general", "llava"),
        ("STVQA (Infinity-MM)", "43k", "general", "vqa"),
        ("MMC-INST", "500k", DOCUMENTS, "infinity-mm"),
        ("MathV360K", "338k", "math/reasoning", "llava"),
        ("MMC-Alignment", "250k", DOCUMENTS, "infinity-mm"),
        ("DocReason", "26k", DOCUMENTS, "infinity-mm"),
        ("ALLaVA", "1.7M", "general", "llava"),
        ("CocoText", "163k", "general", "infinity-mm"),
        ("DocVQA (Infinity-MM)", "16k", DOCUMENTS, "vqa"),
        ("GeoQA+", "72k", "math/reasoning", "infinity-mm"),
        ("DocDownstream", "700k", DOCUMENTS, "infinity-mm"),
        ("Cambrian", "8.3M", MIXED, "llava"),
        ("DocStruct4M", "4M", "OCR, doc/chart/screen", "infinity-mm"),
        ("LLaVA-OneVision", "4M", MIXED, "hf-parquet"),
        ("Docmatix", "1.2M", "doc VQA", "hf-parquet"),
        ("Infinity-Instruct", "7M", "text instruct", "infinity-mm"),
        ("Infinity-MM own synthetic", "0.8M", "six instruction types", "infinity-mm"),
    ]
]
CATALOG: tuple[CatalogEntry, ...] = (
    *INFIMM_PRETRAIN,
    *INFIMM_MULTITASK,
    *INFIMM_CARD,
    *INFIMM_INSTRUCT,
    *INFINITY_PARTS,
    *INFINITY_SOURCES,
)

STAGES: dict[str, tuple[str, ...]] = {
    "infimm": ("pretrain", "multitask", "finetune"),
    "aquila-vl": ("1", "2a", "2b", "2c", "3", "4"),
}
"""The stages of each family's recipes; Aquila-VL's 2a, 2b and 2c are thirds of Infinity-MM's stage 2."""

State = Literal["present", "missing", "differs in count", "of unknown size"]


class Finding(NamedTuple):
    """What there is of one data set."""

    entry: CatalogEntry
    state: State
    samples: int | None
    """Samples that are there; None where none are."""


def check(entries: Iterable[CatalogEntry], counts: Mapping[str, int]) -> list[Finding]:
    """Each entry held against the samples that are there by its folder name."""
    return [_finding(entry, counts.get(entry.slug)) for entry in entries]


def _finding(entry: CatalogEntry, found: int | None) -> Finding:
    if found is None:
        return Finding(entry, "missing", None)
    if entry.samples is None:
        return Finding(entry, "of unknown size", found)
    is_right = abs(found - entry.samples) <= entry.tolerance
    return Finding(entry, "present" if is_right else "differs in count", found)


def prepared_counts(folder: str | Path) -> dict[str, int]:
    """Samples of each prepared data set in a folder: what DIR/NAME/dataset.json says, by NAME in lower case."""
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError("--data", str(folder), "is no folder", "give the one that holds the prepared data sets")
    return {path.parent.name.lower(): _count_in(path) for path in sorted(root.glob("*/dataset.json"))}


def _count_in(path: Path) -> int:
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))["samples"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        samples = None
    if type(samples) is not int or samples < 0:
        remedy = f"run `megavlm data index {path.parent}`"
        raise ConfigError(str(path), None, "does not say how many samples there are", remedy)
    return samples


def entries_of(stage: str) -> list[CatalogEntry]:
    """The data sets of `RECIPE/stage`, such as infimm-llama2-13b/pretrain or aquila-vl-2b/2a; of all stages without."""
    recipe, _, name = stage.partition("/")
    family = next((family for family in STAGES if recipe.startswith(family)), None)
    if family is None or (name and name not in STAGES[family]):
        known = [f"{family}/{name}" for family, names in STAGES.items() for name in names]
        raise ConfigError("RECIPE/stage", stage, "is no stage of a published recipe", f"use one of {', '.join(known)}")
    tables = (*INFIMM_PRETRAIN, *INFIMM_MULTITASK, *INFIMM_CARD, *INFIMM_INSTRUCT)
    if family == "aquila-vl":
        name, tables = name[:1], tuple(INFINITY_PARTS)
    entries = [entry for entry in tables if not name or name in entry.stages]
    return [entry for entry in entries if not entry.only_for or ("7b" not in recipe and "zephyr" not in recipe)]


def table_of(findings: Iterable[Finding]) -> str:
    """One line for each data set."""
    header = ("data set", "folder", "published", "here", "state", "format", "stages", "number from")
    lines = [header]
    for entry, state, samples in findings:
        here = "-" if samples is None else f"{samples:,}"
        size = entry.size + (f" ({entry.only_for} only)" if entry.only_for else "")
        lines.append((entry.name, entry.slug, size, here, state, entry.reader, entry.used_in, entry.source))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
