"""What a search found, and how a run scales, as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from megavlm.build.run_config import RunConfig
from megavlm.plan.cluster import GIB
from megavlm.plan.evaluation import SLACK
from megavlm.plan.guess import Estimate
from megavlm.plan.scale import ScalePoint, limits_named
from megavlm.plan.search import SearchResult
from megavlm.plan.step import PARTS, StepTime

WIDTH = 110
NAMES = {
    "tower": "tower",
    "connector": "connector",
    "cross_attention": "cross-attention",
    "decoder": "decoder",
    "head": "head and loss",
    "data": "data",
    "optimizer": "optimizer",
    "communication": "communication",
    "bubble": "pipeline bubble",
    "messages": "stage messages",
    "imbalance": "uneven images",
}
"""Of what a step's time is split into, for people."""


def search_report(found: SearchResult, run: RunConfig) -> str:
    """The best layouts with reasons, the options of the first, and why the next ones fail."""
    lines = [
        f"{found.considered:,} layouts: {found.refused:,} refused without a trace, {found.traced:,} traced, "
        f"{found.untried:,} left untried"
    ]
    if found.best:
        options = found.best[0].evaluation.choice.options(run)
        lines += ["", *_best(found), ""]
        lines += ["the first one's options:", *wrapped(options, "  ")] if options else ["the first is the run's own"]
    else:
        lines += ["", "none of those that were traced works" if found.untried else "none of them works"]
    if found.next:
        lines += ["", "the next by estimate, not traced:", *_estimated(found.next)]
    if found.failures:
        lines += ["", "what does not work:"]
        for failure in found.failures:
            lines += wrapped(f"{failure.choice.name}: {failure.reason}", "  ")
    if found.misfits:
        lines += ["", "what would be fast but does not fit, by estimate, not traced:", *_estimated(found.misfits)]
    if found.best and not (found.failures or found.misfits):
        lines += ["", "all others fit as well, by estimate"] if found.untried else []
    if found.row_tokens is not None:
        lines += ["", *wrapped(kept_rows(found.row_tokens), "")]
    return "\n".join(lines)


def kept_rows(tokens: int) -> str:
    """What takes the place of the micro-batch where rows are packed, and is not searched."""
    return (
        f"not searched: a microbatch is one packed row, of at most {tokens:,} tokens as the run has it; longer or "
        "shorter ones are planned with data.rows.max_tokens=N"
    )


def _best(found: SearchResult) -> Iterator[str]:
    table = [("", "step s", "MFU", "GiB", "layout")]
    for place, ranked in enumerate(found.best, 1):
        one = ranked.evaluation
        table.append((str(place), f"{one.seconds:.3g}", f"{one.mfu:.1%}", f"{one.needed / GIB:.1f}", one.choice.name))
    have = found.best[0].evaluation.cluster.chip.memory_bytes / GIB
    header, *rows = aligned(table)
    yield f"the fastest that fit (GiB of {have:.1f}, {SLACK:.0%} slack included):"
    yield header
    for row, ranked in zip(rows, found.best, strict=True):
        yield row
        yield from wrapped(ranked.reason, " " * (len(header) - len("layout") + 2))


def _estimated(estimates: Sequence[Estimate]) -> Iterator[str]:
    """Figures of layouts that were not traced, as round as they are rough."""
    table = [("about s", "GiB", "layout")]
    table += [(f"{one.seconds:.2g}", f"{one.needed / GIB:.0f}", one.choice.name) for one in estimates]
    yield from aligned(table)


def scale_report(points: Sequence[ScalePoint]) -> str:
    """A line for each number of GPUs, and what limits the run from where on."""
    table = [("GPUs", "step s", "tokens/s", "MFU", "per GPU", "layout", "limited by")]
    for point in points:
        one = point.evaluation
        if one is None:
            table.append((f"{point.gpus:,}", "-", "-", "-", "-", "-", point.limit))
            continue
        table.append(
            (
                f"{point.gpus:,}",
                f"{one.seconds:.3g}",
                f"{one.tokens_per_second:,.0f}",
                f"{one.mfu:.1%}",
                f"{point.efficiency:.0%}",
                one.choice.name,
                point.limit,
            )
        )
    lines = ["the same global batch on more GPUs (per GPU: tokens a second, over those of the fewest):"]
    lines += aligned(table, texts=2)
    said = limits_named(points)
    return "\n".join([*lines, "", *(said or ["nothing but computing limits it"])])


def split_lines(step: StepTime) -> list[str]:
    """Where a step's time goes, largest first."""
    parts = sorted(((name, seconds) for name, seconds in step.split.items() if seconds > 0), key=lambda pair: -pair[1])
    table = []
    for name, seconds in parts:
        bound = step.bounds.get(name)
        what = f"{bound.share:.0%} {bound.kind}" if bound and name in PARTS else ""
        table.append((f"{seconds:.3f} s", f"{seconds / step.seconds:.1%}", NAMES[name], what))
    return list(aligned(table, texts=2))


def aligned(table: Sequence[Sequence[str]], texts: int = 1) -> Iterator[str]:
    """Columns of equal width; the last ones are text, all others numbers."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))] if table else []
    for row in table:
        numbers = [cell.rjust(width) for cell, width in zip(row[:-texts], widths, strict=False)]
        words = [cell.ljust(width) for cell, width in zip(row[-texts:], widths[-texts:], strict=True)]
        yield "  " + "  ".join([*numbers, *words]).rstrip()


def wrapped(words: str, indent: str) -> list[str]:
    """Lines of words, each further one indented a little more."""
    return textwrap.wrap(
        words,
        max(WIDTH, len(indent) + 40),
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
