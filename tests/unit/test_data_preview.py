"""`megavlm data preview`: the page shows what the loader packs, and nothing that samples hold runs in it."""

from __future__ import annotations

import base64
import hashlib
import io
import random
import re
import tempfile
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qwen_hf import tiny_tokenizer
from random_samples import picture_file
from toy_data import EVIL, EVIL_ID, SMALL, chat, kinds_of_samples, write_dataset, write_tokenizer

from megavlm.batch import IGNORED
from megavlm.cli import main
from megavlm.data.chat import ChatConfig
from megavlm.data.formats import PlannedPicture, Words
from megavlm.data.index import Index
from megavlm.data.look import CountWords
from megavlm.data.preview import PreviewConfig, ShownPicture, make_preview
from megavlm.data.preview_page import page_of, text
from megavlm.data.preview_pictures import figure_of
from megavlm.data.sample import Picture
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer
from megavlm.tiles import STAGE_GRIDS, plan_image

SETS = {"kinds": kinds_of_samples(), "more": [chat(f"more {n}", [], f"{n}?", "word " * (n % 40)) for n in range(80)]}
MEDIA = ("<image>", "<video>")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preview")
    write_tokenizer(root / "tokenizer")
    for name, samples in SETS.items():
        write_dataset(root / name, samples)
        for chat_config in (ChatConfig(), ChatConfig(template="zephyr")):
            words = Words(Tokenizer(root / "tokenizer"), chat_config)
            add_token_counts(root / name, CountWords(str(root / "tokenizer"), chat_config), words.name, words.hash)
    return root


def config_of(data: Path, **settings: object) -> PreviewConfig:
    given = {"tokenizer": str(data / "tokenizer"), "grid": "2/3", "tile_size": 56, "max_tokens": 256, "rows": 4}
    return PreviewConfig.from_dict({**given, **settings})


def folders(data: Path) -> list[str]:
    return [str(data / name) for name in SETS]


class Element(HTMLParser):
    """The page as a browser's parser sees it: each element's tag, attributes and text, in the order of their ends."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.found: list[tuple[str, dict[str, str], str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.open.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag in ("meta", "!doctype"):
            self.handle_endtag(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}, ""))

    def handle_endtag(self, tag: str) -> None:
        name, attributes, text = self.open.pop()
        assert name == tag, f"<{name}> is closed by </{tag}>"
        self.found.append((tag, attributes, "".join(text)))
        if self.open:
            self.open[-1][2].extend(text)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1][2].append(data)

    def all(self, tag: str, kind: str = "") -> list[tuple[dict[str, str], str]]:
        return [(a, text) for name, a, text in self.found if name == tag and (not kind or a.get("class") == kind)]


def test_the_page_holds_what_the_loader_packs(data: Path) -> None:
    preview = make_preview(folders(data), config_of(data, max_tokens=384, rows=100))
    page, words = Element(page_of(preview)), preview.words
    texts, seen, trained = iter(page.all("div", "words")), [], []
    for row in preview.rows:
        assert row.length <= 384 and row.length - row.tokens < 64
        for document in row.documents:
            sample = SETS[document.name.source][document.name.index]
            seen.append(sample.id)
            assert document.id == sample.id and not document.problems and not document.is_cut
            encoded = words.encode(sample)
            is_media = np.isin(encoded.tokens, [words.tokenizer.token_of(tag) or 0 for tag in MEDIA])
            assert np.array_equal(document.tokens[~document.is_picture], encoded.tokens[~is_media])
            is_trained = np.append(False, encoded.targets[1:] != IGNORED)
            assert np.array_equal(document.tokens[document.is_trained], encoded.tokens[is_trained])
            assert [len(picture.files) for picture in document.pictures] == [len(p.files) for p in sample.pictures]
            assert sum(picture.tokens for picture in document.pictures) == document.is_picture.sum()
            said = re.sub(r"picture \d+: [\d,]+ tokens?", "", next(texts)[1])
            assert said == shown(words.tokenizer, encoded.tokens[~is_media])
            trained.append(shown(words.tokenizer, encoded.tokens[is_trained]))
    assert next(texts, None) is None
    assert sorted(seen) == sorted(sample.id for samples in SETS.values() for sample in samples)
    assert "".join(text for _, text in page.all("span", "trained")) == "".join(trained)
    special = {said for _, said in page.all("b") if said.startswith("<")}
    assert special == {"<|im_start|>", "<|im_end|>", "<|endofchunk|>"}


def shown(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """What these tokens say, as a reader of the page sees it."""
    return unescape(text(tokenizer._raw(tokens.tolist())))


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_are_as_full_as_they_get(data: Path, seed: int) -> None:
    """One sample more of the order would need one row more."""
    preview = make_preview(folders(data), config_of(data, seed=seed))
    more = make_preview(folders(data), config_of(data, seed=seed, rows=5))
    places = [{d.name.place for row in found.rows for d in row.documents} for found in (preview, more)]
    assert places[0] == set(range(len(places[0]))) < places[1]
    assert all(row.tokens > 128 for row in preview.rows)


def test_nothing_from_a_sample_runs(data: Path) -> None:
    page = page_of(make_preview([str(data / "kinds")], config_of(data, rows=20)))
    found = Element(page)
    ((_, script),) = found.all("script")
    ((_, style),) = found.all("style")
    policy = next(a["content"] for a, _ in found.all("meta") if "content" in a and "default-src" in a["content"])
    for kind, content in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for tag, attributes, _ in found.found:
        assert tag not in ("img", "iframe", "object", "link", "form", "base", "embed")
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style" and name != "src", (tag, name)
            assert name != "href" or value.startswith(("#", "data:image/")), value
    seen = "".join(said for _, said in found.all("div", "words"))
    assert EVIL.replace("\x00", "\N{SYMBOL FOR NULL}").split("\x1b")[0] in seen
    assert "[U+202E]turned[U+202C] \N{PARTY POPPER}" in seen and "\x1b" not in page
    assert [said for _, said in found.all("span", "id")].count(EVIL_ID) == 1


def test_pictures_show_their_tiles() -> None:
    """The outline holds all patches of the map that is kept, and no other."""
    rng = np.random.default_rng(0)
    for grid in (STAGE_GRIDS["2c"], STAGE_GRIDS["3"]):
        for width, height in [(1600, 500), (420, 1200), (800, 800), (64, 64), *rng.integers(40, 900, (6, 2)).tolist()]:
            plan = plan_image(width, height, "image", grid)
            stream = io.BytesIO()
            Image.new("RGB", (width, height)).save(stream, "PNG")
            picture = ShownPicture(PlannedPicture((0,), plan), [stream.getvalue()], plan.tokens)
            found = Element(figure_of(picture, "p", 1, 200))
            assert plan.split is not None
            (outline, _), *_ = found.all("path", "kept")
            left, top, right, bottom = map(int, re.fullmatch(r"M(\d+) (\d+)H(\d+)V(\d+)H\1Z", outline["d"]).groups())  # type: ignore[union-attr]
            rows = plan.map_patch_rows().ravel()
            tile, place = np.divmod(rows - grid.tokens_per_tile, grid.tokens_per_tile)
            y = tile // plan.split.columns * grid.tile_size + place // grid.tokens_per_side * grid.patch_size
            x = tile % plan.split.columns * grid.tile_size + place % grid.tokens_per_side * grid.patch_size
            kept = (x.min(), y.min(), x.max() + grid.patch_size, y.max() + grid.patch_size)
            assert (left, top, right, bottom) == kept
            uses = [attributes["transform"] for attributes, _ in found.all("use")]
            split = plan.split
            assert f"translate({split.left} {split.top}) scale({split.resized_width} {split.resized_height})" in uses
            assert len(found.all("text")) == plan.tiles and len(found.all("image")) == 1
            uri = found.all("image")[0][0]["href"]
            assert max(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size) == min(
                200, max(width, height)
            )


def test_damage_and_cuts_are_shown(data: Path, tmp_path: Path) -> None:
    samples = [chat(str(n), [], "?", "long " * 60) for n in range(3)]
    samples += [
        chat("cut picture", [Picture((picture_file(np.random.default_rng(0), "JPEG", (40, 30))[:-200],))], "?", "!")
    ]
    folder = write_dataset(tmp_path / "set", samples)
    words = Words(Tokenizer(data / "tokenizer"), ChatConfig())
    add_token_counts(folder, words.count, words.name, words.hash)
    offset = int(Index.open(folder).rows([1]).words.offset[0])
    shard = folder / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[offset + 3] ^= 1
    shard.write_bytes(content)
    preview = make_preview([str(folder)], config_of(data, tokens_per_sample=150))
    documents = {document.name.index: document for row in preview.rows for document in row.documents}
    assert [len(documents[n].tokens) for n in range(3)] == [150] * 3
    assert [documents[n].is_cut for n in range(4)] == [True, True, True, False]
    assert [bool(documents[n].problems) for n in range(4)] == [False, True, False, True]
    assert documents[1].id is None and not documents[1].is_trained.any()
    page = Element(page_of(preview))
    assert sum("the checksum of its text differs" in said for _, said in page.all("p", "bad")) == 1
    assert sum("A blank of 150 tokens stands here" in said for _, said in page.all("p", "end")) == 1
    assert ("damaged", "2") in zip([t for _, t in page.all("dt")][5:], [t for _, t in page.all("dd")][5:], strict=True)
    kept = make_preview([str(folder)], config_of(data, tokens_per_sample=150, over_long="drop"))
    assert kept.dropped == 3 and sum(len(row.documents) for row in kept.rows) == 1


def test_middle_squares(data: Path) -> None:
    config = config_of(data, chat={"template": "zephyr"}, grid=None, tile_size=28, over_long="cut")
    preview = make_preview([str(data / "kinds")], config)
    pictures = [picture for row in preview.rows for document in row.documents for picture in document.pictures]
    assert {picture.tokens for picture in pictures} == {1} and len(pictures) == 9
    drawn = [a["d"] for a, _ in Element(page_of(preview)).all("path", "kept")]
    assert "M130 0H170V40H130Z" in drawn and "M0 85H30V115H0Z" in drawn  # of 300 x 40, of 30 x 200


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, tokenizer = str(tmp_path / "page.html"), str(data / "tokenizer")
    command = ["data", "preview", *folders(data), "--tokenizer", tokenizer, *SMALL, "--max-tokens", "512"]
    assert main([*command, "--html", out, "--rows", "2"]) == 0
    assert capsys.readouterr().out.startswith("2 rows with ")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    cases = [
        (command[2:], "--html = None: is missing"),
        ([*command[2:], "--html", str(tmp_path / "none" / "x")], "name a file in a folder that exists"),
        ([*command[2:], "--html", out, "--mask", "clean"], "--mask clean`"),
        ([*command[2:], "--html", out, "--max-tokens", "100"], "max_tokens = 100: is no multiple of length_multiple"),
        ([*command[2:], "--html", out, "--rows", "0"], "--rows = 0: is not between 1 and 256"),
        ([command[2], *command[2:], "--html", out], "is given twice"),
        ([str(tmp_path / "none"), *command[4:], "--html", out], "is no folder"),
        ([command[2], "--html", out], "--tokenizer = None: is missing"),
    ]
    for arguments, problem in cases:
        assert main(["data", "preview", *arguments]) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("megavlm: error: ") and problem in error, error


def test_pieces_of_a_text_are_the_text() -> None:
    rng = random.Random(0)
    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        wrapped = Tokenizer(folder)
    for _ in range(200):
        written = "".join(rng.choice("ab \n\u00e9\u4e16\U0001f389\ufffd") for _ in range(rng.randrange(12)))
        tokens = wrapped.encode(f"{written}<|im_end|>{written}")
        pieces = wrapped.pieces(tokens)
        assert len(pieces) == len(tokens)
        assert "".join(said for said, _ in pieces) == f"{written}<|im_end|>{written}"
        assert [said for said, is_special in pieces if is_special] == ["<|im_end|>"]
