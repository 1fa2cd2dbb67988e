"""The page of a preview: one file, nothing from elsewhere, and nothing that samples hold is ever run.

All text is escaped, and the page's own policy allows this one script and style alone, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from megavlm.data.files import atomic_file
from megavlm.data.preview import Preview, PreviewConfig, ShownDocument, ShownRow, make_preview
from megavlm.data.preview_pictures import figure_of
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import ConfigError

SIDES = ((60, 560), (200, 320))
"""(up to so many pictures in a page, pixels of their longer side)."""
LEAST_SIDE = 200
BAR_HEIGHT = 10
_CONTROLS: dict[int, str | int] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {127: 0x2421}
# Those that turn the direction of what follows would show a text in another order than its tokens have.
_CONTROLS |= {
    code: f"[U+{code:04X}]" for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def write_preview(folders: Sequence[str], config: PreviewConfig) -> str:
    """Write the page of some rows; what was written, in words."""
    if config.html is None:
        raise ConfigError("--html", None, "is missing", "name the file to write")
    path = Path(config.html)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError("--html", config.html, "cannot be written", "name a file in a folder that exists")
    preview = make_preview(folders, config)
    page = page_of(preview).encode("utf-8", "replace")
    with atomic_file(path) as file:
        file.write(page)
    samples = sum(len(row.documents) for row in preview.rows)
    return f"{len(preview.rows)} rows with {samples} samples in {config.html} ({len(page):,} bytes)"


def page_of(preview: Preview) -> str:
    """The whole page."""
    folder = files("megavlm.data") / "preview_files"
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}';"
        " base-uri 'none'; form-action 'none'"
    )
    pictures = sum(len(document.pictures) for row in preview.rows for document in row.documents)
    longest = next((side for most, side in SIDES if pictures <= most), LEAST_SIDE)
    rows = "".join(_row(number, row, preview, longest) for number, row in enumerate(preview.rows, 1))
    title = f"Packed rows of {', '.join(preview.folders)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{style}</style></head>"
        f"<body>{_patterns()}{_head(preview)}{_tools(len(preview.rows))}<main>{rows}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def text(words: str) -> str:
    """Words from outside as HTML; control characters are shown."""
    return escape(words.translate(_CONTROLS))


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _patterns() -> str:
    """What drawings of the whole page fill with."""
    return (
        '<svg class="nothing" aria-hidden="true"><defs>'
        '<pattern id="void" width="28" height="28" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect class="stripe" width="8" height="28"/></pattern>'
        "</defs></svg>"
    )


def _head(preview: Preview) -> str:
    config, rows = preview.config, preview.rows
    documents = [document for row in rows for document in row.documents]
    tokens, computed = sum(row.tokens for row in rows), sum(row.length for row in rows)
    trained, pictures = sum(row.trained for row in rows), sum(len(document.pictures) for document in documents)
    figures = [
        ("rows", f"{len(rows):,}"),
        ("samples", f"{len(documents):,}"),
        ("pictures", f"{pictures:,}"),
        ("tiles", f"{sum(document.tiles for document in documents):,}"),
        ("tokens", f"{tokens:,}"),
        ("of tokens trained", _share(trained, tokens)),
        ("real, not padding", _share(tokens, computed)),
    ]
    damaged = sum(bool(document.problems) for document in documents)
    if damaged:
        figures.append(("damaged", f"{damaged:,}"))
    if preview.dropped:
        figures.append(("left out", f"{preview.dropped:,}"))
    chat = config.chat
    settings = [
        ("Data", ", ".join(preview.folders)),
        ("Tokenizer", f"{config.tokenizer}"),
        ("Template", f"{chat.template}{f', {chat.mask} mask' if chat.template == 'chatml' else ''}"),
        ("Pictures", config.grid_in_words),
        ("Rows", f"at most {config.max_tokens:,} tokens; over-long samples: {config.over_long}; seed {config.seed}"),
    ]
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    said = "".join(f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>" for name, value in settings)
    return f'<header><h1>Packed rows</h1><dl class="settings">{said}</dl><dl class="figures">{tiles}</dl></header>'


def _tools(rows: int) -> str:
    legend = (
        '<span><i class="key trained"></i>trained</span><span><i class="key text"></i>not trained</span>'
        '<span><i class="key picture"></i>picture</span><span><i class="key padding"></i>padding</span>'
        '<span><i class="key kept"></i>part of a picture that is kept</span>'
    )
    return (
        '<nav aria-label="Rows"><div class="buttons">'
        '<button type="button" id="previous" aria-keyshortcuts="k" title="Previous row (k)">↑</button>'
        '<button type="button" id="next" aria-keyshortcuts="j" title="Next row (j)">↓</button>'
        f'<output id="place">Row 1 of {rows}</output>'
        '<button type="button" id="bounds" aria-pressed="false" aria-keyshortcuts="t">Show tokens <kbd>t</kbd></button>'
        '<button type="button" id="fold" aria-pressed="false" aria-keyshortcuts="f">Fold <kbd>f</kbd></button>'
        f'</div><div class="legend">{legend}</div></nav>'
    )


def _row(number: int, row: ShownRow, preview: Preview, longest: int) -> str:
    padding = row.length - row.tokens
    facts = [
        f"{row.tokens:,} of {preview.config.max_tokens:,} tokens",
        f"{_share(row.tokens, preview.config.max_tokens)} full",
        _counted(len(row.documents), "sample"),
        _counted(sum(len(document.pictures) for document in row.documents), "picture"),
        _counted(sum(document.tiles for document in row.documents), "tile"),
        f"{row.trained:,} trained",
    ]
    documents = "".join(
        _document(f"{number}-{place}", place, document, preview, longest)
        for place, document in enumerate(row.documents, 1)
    )
    end = (
        f'<p class="end"><span class="chip padding">padding: {_counted(padding, "token")}</span></p>' if padding else ""
    )
    return (
        f'<section id="row-{number}" class="row" tabindex="-1" aria-labelledby="name-{number}">'
        f'<h2 id="name-{number}">Row {number} <small>{" · ".join(facts)}</small></h2>'
        f"{_bar(number, row, preview.config.max_tokens)}{documents}{end}</section>"
    )


def _bar(number: int, row: ShownRow, most: int) -> str:
    """How full the row is, and of what."""
    parts, first = [], 0
    for place, document in enumerate(row.documents, 1):
        drawn = "".join(
            f'<rect class="{kind}" x="{first + start}" width="{end - start}" height="{BAR_HEIGHT}"/>'
            for kind, start, end in _runs(document)
        )
        last = first + len(document.tokens)
        edge = f'<path class="edge" d="M{last} 0V{BAR_HEIGHT}"/>'
        name = f"Sample {place}: {_counted(len(document.tokens), 'token')}"
        parts.append(f'<a href="#d-{number}-{place}" aria-label="{name}"><title>{name}</title>{drawn}{edge}</a>')
        first = last
    parts.append(f'<rect class="padding" x="{first}" width="{row.length - first}" height="{BAR_HEIGHT}"/>')
    label = f"{row.tokens} of {most} tokens"
    return (
        f'<svg class="bar" role="group" aria-label="{label}" viewBox="0 0 {most} {BAR_HEIGHT}"'
        f' preserveAspectRatio="none"><rect class="room" width="{most}" height="{BAR_HEIGHT}"/>{"".join(parts)}</svg>'
    )


def _runs(document: ShownDocument) -> Iterator[tuple[str, int, int]]:
    """(kind, from, to) of neighbouring tokens of one kind."""
    kinds = [
        "picture" if is_picture else "trained" if is_trained else "text"
        for is_picture, is_trained in zip(document.is_picture.tolist(), document.is_trained.tolist(), strict=True)
    ]
    first = 0
    for kind, run in groupby(kinds):
        last = first + len(list(run))
        yield kind, first, last
        first = last


def _document(anchor: str, place: int, document: ShownDocument, preview: Preview, longest: int) -> str:
    name = document.name
    of_pictures = int(document.is_picture.sum())
    facts = [
        _counted(len(document.tokens), "token"),
        f"{len(document.tokens) - of_pictures:,} text + {of_pictures:,} picture" if of_pictures else "text alone",
        f"{int(document.is_trained.sum()):,} trained",
    ]
    if document.tiles:
        facts.append(_counted(document.tiles, "tile"))
    if document.is_cut:
        facts.append("last text cut off")
    problems = "".join(f'<p class="bad">{text(problem)}</p>' for problem in document.problems)
    figures = "".join(
        figure_of(picture, f"p-{anchor}-{number}", number, longest)
        for number, picture in enumerate(document.pictures, 1)
    )
    drawn = f'<div class="pictures">{figures}</div>' if figures else ""
    own = "" if document.id is None else f'<span class="id">{text(document.id)}</span>'
    return (
        f'<details open id="d-{anchor}" class="sample"><summary><b>{place}</b>'
        f'<span class="source">{text(name.source)} <span class="number">#{name.index}</span></span>{own}'
        f'<span class="facts">{" · ".join(facts)}</span></summary>{problems}'
        f"{drawn}{_words(anchor, document, preview.words.tokenizer)}</details>"
    )


def _words(anchor: str, document: ShownDocument, tokenizer: Tokenizer) -> str:
    if document.problems and not document.is_trained.any():
        size = _counted(len(document.tokens), "token")
        return f'<p class="end">A blank of {size} stands here; nothing is trained.</p>'
    parts, picture = [], 0
    for kind, first, last in _runs(document):
        if kind != "picture":
            words = _tokens(tokenizer.pieces(document.tokens[first:last].tolist()))
            parts.append(f'<span class="trained">{words}</span>' if kind == "trained" else words)
            continue
        while first < last:  # pictures may stand side by side
            tokens = document.pictures[picture].tokens
            picture, first = picture + 1, first + tokens
            said = f"picture {picture}: {_counted(tokens, 'token')}"
            parts.append(f'<a class="chip picture" href="#p-{anchor}-{picture}">{said}</a>')
    return f'<div class="words" dir="auto">{"".join(parts)}</div>'


def _tokens(pieces: list[tuple[str, bool]]) -> str:
    """Each token an element; line ends are shown, and end a line."""
    found = []
    for said, is_special in pieces:
        if said:
            tag = "b" if is_special else "i"
            found.append(f"<{tag}>{text(said).replace(chr(10), '<u></u>' + chr(10))}</{tag}>")
    return "".join(found)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
