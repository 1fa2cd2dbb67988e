"""The page of a plan: one file, nothing from elsewhere, no script, readable in light and dark, narrow and wide.

All text is escaped, and the page's own policy allows this one style alone, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from megavlm.data.files import atomic_file
from megavlm.errors import ConfigError
from megavlm.plan.cluster import GIB, Cluster
from megavlm.plan.evaluation import SLACK, Evaluation, needed_bytes
from megavlm.plan.page_drawings import SLACK_NAME, bar, memory_parts, memory_scale, scale_chart, timeline
from megavlm.plan.report import NAMES, kept_rows
from megavlm.plan.scale import ScalePoint, limits_named
from megavlm.plan.search import SearchResult
from megavlm.plan.step import PARTS
from megavlm.plan.text import spoken_hours

MEMORY_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "batch": "rows waiting",
    "communication": "communication",
    SLACK_NAME: "allocator's slack",
}


@dataclass(frozen=True, kw_only=True)
class PlanPage:
    """What is shown of one run."""

    name: str
    """The recipe's, with its stage."""
    evaluation: Evaluation
    steps: int
    """Of the run."""
    options: str = ""
    """As they would be typed behind `megavlm train RECIPE`."""
    search: SearchResult | None = None
    scale: Sequence[ScalePoint] = ()
    loading: Sequence[str] = ()
    """What the input pipeline must deliver, a sentence each."""
    assumptions: Sequence[str] = ()


def check_page_place(html: str) -> None:
    """Refuse a file that no page can be written to."""
    path = Path(html)
    if not html or path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError("--html", html, "cannot be written", "name a file in a folder that exists")


def write_page(plans: Sequence[PlanPage], html: str, refused: Mapping[str, str] | None = None) -> str:
    """Write the page; what was written, in words."""
    check_page_place(html)
    page = page_of(plans, refused).encode("utf-8", "replace")
    with atomic_file(Path(html)) as file:
        file.write(page)
    return f"the plan as a page: {html} ({len(page):,} bytes)"


def page_of(plans: Sequence[PlanPage], refused: Mapping[str, str] | None = None) -> str:
    """The whole page, of one stage or several; `refused` are those that have no plan, and why."""
    style = (files("megavlm.plan") / "page_files" / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    refused = refused or {}
    title = escape(f"Plan of {', '.join([*(plan.name for plan in plans), *refused])}")
    body = "".join(_plan(plan, number) for number, plan in enumerate(plans, 1)) + _refused(refused)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head>"
        f"<body>{_patterns()}{_contents(plans, refused)}<main>{body}</main></body></html>\n"
    )


def _patterns() -> str:
    """What drawings of the whole page fill with."""
    return (
        '<svg class="nothing" aria-hidden="true"><defs><pattern id="idle" width="8" height="8"'
        ' patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect class="idle-ground" width="8" height="8"/><rect class="idle-stripe" width="3" height="8"/>'
        "</pattern></defs></svg>"
    )


def _contents(plans: Sequence[PlanPage], refused: Mapping[str, str]) -> str:
    if not plans or len(plans) + len(refused) == 1:
        return ""
    works = [plan for plan in plans if plan.evaluation.fits]
    hours = sum(plan.evaluation.hours(plan.steps) for plan in works)
    gpus = plans[0].evaluation.cluster.gpus
    links = "".join(f'<li><a href="#plan-{n}">{escape(plan.name)}</a></li>' for n, plan in enumerate(plans, 1))
    stages = len(plans) + len(refused)
    which = "in all" if len(works) == stages else f"in the {len(works)} of {stages} stages that work"
    said = f"{spoken_hours(hours)} {which}, {hours * gpus:,.0f} GPU-hours"
    return f'<nav aria-label="Stages"><ul>{links}</ul><p>{said}</p></nav>'


def _refused(refused: Mapping[str, str]) -> str:
    return "".join(
        f'<article><header><h1>{escape(name)}</h1><p class="verdict bad">It has no plan: {escape(why)}.</p></header>'
        "</article>"
        for name, why in refused.items()
    )


def _plan(plan: PlanPage, number: int) -> str:
    sections = [
        ("Memory of a GPU", _memory(plan.evaluation)),
        ("Where a step's time goes", _time(plan.evaluation) + _notes(plan.loading)),
        ("The pipeline", _pipeline(plan.evaluation)),
        ("Layouts", _layouts(plan.search) if plan.search else ""),
        ("More GPUs, the same batch", _scale(plan.scale) if plan.scale else ""),
        ("Assumed", _assumed(plan)),
    ]
    shown = "".join(f"<section><h2>{title}</h2>{inner}</section>" for title, inner in sections if inner)
    return f'<article id="plan-{number}">{_head(plan)}{shown}</article>'


def _head(plan: PlanPage) -> str:
    one = plan.evaluation
    hours = one.hours(plan.steps)
    floor = hours * one.mfu
    have = one.cluster.chip.memory_bytes / GIB
    figures = [
        (f"{one.seconds:.3g} s", "a step"),
        (f"{one.mfu:.1%}", "MFU"),
        (f"{one.tokens_per_second:,.0f}", "tokens a second"),
        (f"{one.images_per_second:,.0f}", "images or tiles a second"),
        (f"{hours:,.1f} hours", f"({hours / 24:,.1f} days) for {plan.steps:,} steps"),
        (f"{hours * one.cluster.gpus:,.0f}", "GPU-hours"),
        (f"{floor:,.1f} hours", f"({floor / 24:,.1f} days) at 100 % of the peak"),
        (f"{one.needed / GIB:.1f} of {have:.1f} GiB", "on the fullest GPU"),
    ]
    settings = [
        ("Cluster", f"{one.cluster.name}, {one.cluster.gpus:,} GPUs"),
        ("Layout", f"{one.choice.name}, {one.choice.data_parallel(one.cluster.gpus):,} copies of the model"),
        ("Microbatches", f"{one.microbatches:,} for each copy"),
    ]
    if plan.options:
        settings.append(("Options", plan.options))
    verdict = (
        '<p class="verdict good">It fits.</p>' if one.fits else f'<p class="verdict bad">{escape(one.misfit)}.</p>'
    )
    said = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in settings)
    tiles = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for value, name in figures)
    return (
        f"<header><h1>{escape(plan.name)}</h1>{verdict}"
        f'<dl class="settings">{said}</dl><dl class="figures">{tiles}</dl></header>'
    )


def _memory(one: Evaluation) -> str:
    have = one.cluster.chip.memory_bytes
    whole = memory_scale(one)
    rows = []
    for profile, memory in zip(one.profiles, one.memory, strict=True):
        needed = needed_bytes(memory)
        said = ", ".join(f"{MEMORY_NAMES[name]} {size / GIB:.1f}" for name, size in memory_parts(memory) if size)
        label = f"Stage {profile.stage}: {needed / GIB:.1f} GiB ({said})"
        drawn = bar([(f"m-{name}", size) for name, size in memory_parts(memory)], whole, label, mark=have)
        over = ' class="over"' if needed > have else ""
        rows.append(
            f'<div class="lane"><b>stage {profile.stage}<small>{profile.layers} layers, '
            f"{profile.in_flight} in flight</small></b>{drawn}<span{over}>{needed / GIB:.1f} GiB</span></div>"
        )
    note = (
        f'<p class="note">The rows that need most; {SLACK:.0%} of what is in use is taken to be lost between allocated '
        f"blocks. The line is what a GPU has: {have / GIB:.1f} GiB.</p>"
    )
    return f"{_legend('m', MEMORY_NAMES)}{''.join(rows)}{_memory_table(one)}{note}"


def _memory_table(one: Evaluation) -> str:
    head = ["stage", "row", *MEMORY_NAMES.values(), "in all"]
    rows = []
    for profile in one.profiles:
        for row in (profile.mean, profile.worst):
            cells = [f"{size / GIB:.2f}" for _, size in memory_parts(row.memory)]
            rows.append([str(profile.stage), row.name, *cells, f"{needed_bytes(row.memory) / GIB:.2f}"])
    return f"<details><summary>In numbers (GiB)</summary>{_table(head, rows, words=(1,))}</details>"


def _time(one: Evaluation) -> str:
    step = one.step
    parts = [(name, seconds) for name, seconds in step.split.items() if seconds > 0]
    label = ", ".join(f"{NAMES[name]} {seconds / step.seconds:.0%}" for name, seconds in parts)
    drawn = bar([(f"t-{name}", seconds) for name, seconds in parts], step.seconds, label)
    rows = []
    for name, seconds in sorted(parts, key=lambda pair: -pair[1]):
        bound = step.bounds.get(name)
        what = f"{_KINDS[bound.kind]} ({bound.share:.0%})" if bound and name in PARTS else _waits(one, name)
        key = f'<i class="key t-{name}"></i>'
        cells = (f"{key}{NAMES[name]}", f"{seconds:.3f} s", f"{seconds / step.seconds:.1%}", escape(what))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>part</th><th>seconds</th><th>share</th><th>bound by</th></tr>"
    of_stage = f", of stage {step.busiest}, the busiest" if len(one.profiles) > 1 else ""
    return (
        f'<div class="whole">{drawn}</div><div class="wide"><table class="split">{head}{"".join(rows)}</table></div>'
        f'<p class="note">Of a step of {step.seconds:.3f} s{of_stage}.</p>'
    )


def _notes(lines: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(line[:1].upper() + line[1:])}.</p>' for line in lines)


_KINDS = {"matmul": "products", "attention": "attention", "memory": "memory bandwidth", "comm": "the network"}
_GROUPS = {"tp": "tensor-parallel", "dp": "data-parallel", "pp": "pipeline", "mp": "model-parallel", "world": "all"}


def _waits(one: Evaluation, name: str) -> str:
    if name == "communication":
        groups = sorted(one.step.groups.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{_GROUPS.get(group, group)} {seconds:.3f} s" for group, seconds in groups if seconds > 5e-4)
    waits = {"bubble": "other stages", "messages": "what other stages send", "imbalance": "the slowest replica"}
    return {**waits, "data": "CPU cores that read and decode"}[name]


def _pipeline(one: Evaluation) -> str:
    if len(one.profiles) == 1:
        return ""
    pipeline = one.step.pipeline
    kind = "interleaved" if pipeline.shape.chunks > 1 else "1F1B"
    legend = (
        '<p class="legend"><span><i class="key p-forward"></i>forward</span>'
        '<span><i class="key p-backward"></i>backward</span><span><i class="key p-idle"></i>waiting</span></p>'
    )
    note = (
        f'<p class="note">{kind}, {pipeline.shape.microbatches:,} microbatches, the slowest replica; a stage waits '
        f"{pipeline.idle_share:.1%} of the time on the average. Every second microbatch is lighter.</p>"
    )
    return legend + timeline(pipeline) + note


def _layouts(found: SearchResult) -> str:
    rows = [
        [
            f"{place}",
            one.evaluation.choice.name,
            f"{one.evaluation.seconds:.3g} s",
            f"{one.evaluation.mfu:.1%}",
            f"{one.evaluation.needed / GIB:.1f} GiB",
            one.reason,
        ]
        for place, one in enumerate(found.best, 1)
    ]
    best = _table(["", "layout", "step", "MFU", "memory", "why"], rows, words=(1, 5)) if rows else "<p>None works.</p>"
    failing = "".join(
        f"<li><b>{escape(failure.choice.name)}</b> {escape(failure.reason)}</li>" for failure in found.failures
    )
    failed = f"<h3>What does not work</h3><ul>{failing}</ul>" if failing else ""
    note = (
        f'<p class="note">{found.considered:,} layouts: {found.refused:,} refused without a trace, {found.traced:,} '
        f"traced, {found.untried:,} left untried.</p>"
    )
    if found.row_tokens is not None:
        note += _notes([kept_rows(found.row_tokens)])
    return best + failed + note


def _scale(points: Sequence[ScalePoint]) -> str:
    rows = []
    for point in points:
        one = point.evaluation
        if one is None:
            rows.append([f"{point.gpus:,}", "", "", "", "", "", point.limit])
            continue
        speed, name = f"{one.tokens_per_second:,.0f}", one.choice.name
        shares = (f"{one.mfu:.1%}", f"{point.efficiency:.0%}")
        rows.append([f"{point.gpus:,}", f"{one.seconds:.3g} s", speed, *shares, name, point.limit])
    head = ["GPUs", "step", "tokens/s", "MFU", "per GPU", "layout", "limited by"]
    said = "; ".join(limits_named(points))
    note = f'<p class="note">{escape(said[:1].upper() + said[1:])}.</p>' if said else ""
    return scale_chart(points) + _table(head, rows, words=(5, 6)) + note


def _assumed(plan: PlanPage) -> str:
    lines = [*plan.assumptions, *_of_cluster(plan.evaluation.cluster)]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _of_cluster(cluster: Cluster) -> Iterator[str]:
    chip = cluster.chip
    fp8 = f", {chip.fp8_tflops:,.0f} in FP8" if chip.fp8_tflops else ""
    memory = f"{chip.memory_gib:g} GiB of memory at {chip.memory_gb_s:,.0f} GB/s"
    yield f"{chip.name}: {chip.bf16_tflops:,.0f} TFLOP/s in bf16{fp8}; {memory}"
    for name, link in (("within a node", cluster.inside), ("between nodes", cluster.between)):
        yield f"{name} {link.gb_s:g} GB/s a GPU and direction, of which collectives reach {link.reached:.0%}"


def _legend(prefix: str, names: dict[str, str]) -> str:
    keys = "".join(f'<span><i class="key {prefix}-{key}"></i>{escape(name)}</span>' for key, name in names.items())
    return f'<p class="legend">{keys}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int]) -> str:
    def cell(tag: str, column: int, value: str) -> str:
        kind = ' class="words"' if column in words else ""
        return f"<{tag}{kind}>{escape(value)}</{tag}>"

    lines = [
        "<tr>" + "".join(cell(tag, column, value) for column, value in enumerate(row)) + "</tr>"
        for tag, row in [("th", head), *(("td", row) for row in rows)]
    ]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
