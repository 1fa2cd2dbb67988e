"""An inspection in words and as bars of block characters, for terminals of any width, pipes and files."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from megavlm.data.inspection import ASPECT_NAMES, Inspection
from megavlm.data.tally import Tally

PIPED_WIDTH = 100
"""Columns where there is no terminal."""
WIDEST, NARROWEST = 120, 40
MOST_LISTED = 12
"""Sources, kinds and formats that are named; the rest is summed up."""
EIGHTHS = " ▏▎▍▌▋▊▉█"


class Line(NamedTuple):
    """A bar: what it is of, and how much there is."""

    label: str
    values: int


def columns_of(stream: TextIO) -> int:
    """How wide what is written to a stream may be."""
    columns = shutil.get_terminal_size((PIPED_WIDTH, 24)).columns if stream.isatty() else PIPED_WIDTH
    return max(NARROWEST, min(columns, WIDEST))


def has_blocks(stream: TextIO) -> bool:
    """Whether block characters can be written to a stream."""
    try:
        EIGHTHS.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def written(found: Inspection, columns: int = PIPED_WIDTH, blocks: bool = True) -> str:
    """The whole inspection."""
    parts = [[line for name, value in _facts(found) for line in _fact(name, value, columns)]]
    for name, counter in (("sources", found.words.sources), ("kinds", found.words.kinds)):
        if counter:
            parts.append(_listed(f"{name} (of {found.words.read:,} samples read)", counter, columns, blocks))
    if found.images + found.videos:
        parts.append(_listed("picture files", found.formats, columns, blocks))
    for name, tally in found.tallies:
        lines = [Line(_range(bar.first, bar.last), bar.values) for bar in tally.bars()]
        parts.append([*_wrapped(heading(name, tally), columns, " " * 4), *bars(lines, columns, blocks)])
        if name.startswith("height"):
            lines = [Line(*pair) for pair in zip(ASPECT_NAMES, found.aspect.counts.tolist(), strict=True)]
            parts.append(["width to height", *bars(_trimmed(lines), columns, blocks)])
    text = "\n\n".join("\n".join(lines) for lines in parts)
    # A pipe of another encoding gets what it can hold.
    return text if blocks else text.encode("ascii", "replace").decode()


def print_inspection(found: Inspection, stream: TextIO | None = None) -> None:
    """Write the whole inspection to a terminal or a pipe."""
    stream = sys.stdout if stream is None else stream
    print(written(found, columns_of(stream), has_blocks(stream)), file=stream)


def _fact(name: str, value: str, columns: int) -> list[str]:
    return _wrapped(f"{name:<14}  {_printable(value)}", columns, " " * 16)


def _wrapped(line: str, columns: int, indent: str) -> list[str]:
    return textwrap.wrap(line, columns, subsequent_indent=indent, drop_whitespace=True, break_on_hyphens=False)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    """(name, value) of what is told first."""
    report, words, counts, cut = found.report, found.words, found.counts, found.cut
    rows = [
        ("data set", found.folder),
        ("samples", f"{report.samples:,} in {found.shards:,} shards, {in_bytes(report.bytes)}"),
        ("images", f"{found.images:,}"),
    ]
    if found.videos:
        rows.append(("videos", f"{found.videos:,} with {found.frames:,} frames"))
    if report.refused:
        rows.append(("refused", f"{sum(report.refused.values()):,} when it was made, see index/refused.jsonl"))
    rows += [("damaged", f"{name}: {problem}") for name, problem in report.damaged.items()]
    if words.failed:
        rows.append(("unreadable", f"{words.failed:,} of {words.failed + words.read:,}: `megavlm data lint` says why"))
    if counts is not None:
        uncounted = f", {counts.unreadable:,} samples could not be counted" if counts.unreadable else ""
        rows.append(("text tokens", f"{counts.text.sum:,} ({counts.name}){uncounted}"))
        rows.append(
            ("trained tokens", f"{counts.targets.sum:,} ({share(counts.targets.sum, counts.text.sum)} of text)")
        )
    else:
        rows.append(("text tokens", _why_uncounted(found)))
    if cut is not None:
        rows.append(("image tokens", f"{cut.tokens.sum:,} in {cut.tiles.sum:,} tiles"))
        if cut.total.count:
            rows.append(("tokens in all", f"{cut.total.sum:,}"))
    return rows


def _why_uncounted(found: Inspection) -> str:
    if found.token_sets:
        return f"name by --tokenizer which counts are meant: there are {', '.join(found.token_sets)}"
    return f"not counted: `megavlm data index {found.folder} --tokenizer FOLDER` counts them"


def _listed(name: str, counter: Counter[str], columns: int, blocks: bool) -> list[str]:
    """The most frequent entries, and the rest."""
    most = counter.most_common()
    lines = [Line(_printable(key) or "(none)", count) for key, count in most[:MOST_LISTED]]
    if len(most) > MOST_LISTED:
        lines.append(Line(f"{len(most) - MOST_LISTED} others", sum(count for _, count in most[MOST_LISTED:])))
    return [name, *bars(lines, columns, blocks)]


def heading(name: str, tally: Tally) -> str:
    """A distribution's name and its figures."""
    low, middle, high = (tally.quantile(share) for share in (0.05, 0.5, 0.95))
    return (
        f"{name}: median {middle:,}, mean {tally.mean:,.1f}, 90 % within {low:,} to {high:,},"
        f" all within {tally.least:,} to {tally.most:,}"
    )


def bars(lines: Sequence[Line], columns: int, blocks: bool = True) -> list[str]:
    """One line for each: label, bar, count and share."""
    if not lines:
        return []
    total, most = sum(line.values for line in lines), max(line.values for line in lines)
    width = max(len(line.label) for line in lines)
    width = min(width, columns // 2)
    number = max(len(f"{line.values:,}") for line in lines)
    room = max(4, columns - width - number - len("  ") * 3 - len("100.0 %") - 1)
    found = []
    for line in lines:
        label = line.label if len(line.label) <= width else line.label[: width - 1] + ("…" if blocks else "~")
        bar = _bar(line.values, most, room, blocks)
        found.append(f"  {label:>{width}} {bar:<{room}}  {line.values:>{number},}  {share(line.values, total):>7}")
    return found


def _bar(count: int, most: int, room: int, blocks: bool) -> str:
    """A bar to the eighth of a character; what there is at all shows."""
    eighths = max(round(8 * room * count / most), 1) if count else 0
    if not blocks:
        return "#" * max(eighths // 8, 1 if count else 0)
    whole, rest = divmod(eighths, 8)
    return (EIGHTHS[8] * whole + (EIGHTHS[rest] if rest else "")) or ""


def share(part: int, whole: int) -> str:
    """A part of a whole in percent."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def in_bytes(count: int) -> str:
    """Bytes in a unit that fits."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _trimmed(lines: Sequence[Line]) -> list[Line]:
    """Without the empty ones at both ends."""
    full = [place for place, line in enumerate(lines) if line.values]
    return list(lines[full[0] : full[-1] + 1]) if full else []


def _printable(text: str) -> str:
    """What a terminal shows and does not obey: names come from the data."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
