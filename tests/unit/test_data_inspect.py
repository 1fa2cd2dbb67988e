"""`megavlm data inspect`: its figures are those of the samples, on terminals of any width and for any size."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_index import make_sparse_index
from toy_data import SMALL, SMALL_GRID, kinds_of_samples, write_dataset, write_tokenizer

from megavlm.cli import main
from megavlm.data import inspection
from megavlm.data.chat import ChatConfig
from megavlm.data.formats import Words
from megavlm.data.headers import read_header
from megavlm.data.inspection import InspectConfig, as_json, inspect_folder
from megavlm.data.inspection_text import Line, bars, has_blocks, print_inspection, written
from megavlm.data.look import CountWords
from megavlm.data.sample import Picture
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer
from megavlm.tiles import MediaKind, plan_image

SAMPLES = [sample for seed in range(6) for sample in kinds_of_samples(seed)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with token counts, and the tokenizer."""
    root = tmp_path_factory.mktemp("inspect")
    write_tokenizer(root / "tokenizer")
    write_dataset(root / "set", SAMPLES)
    count(root, ChatConfig())
    return root


def count(root: Path, chat: ChatConfig) -> Words:
    words = Words(Tokenizer(root / "tokenizer"), chat)
    add_token_counts(root / "set", CountWords(str(root / "tokenizer"), chat), words.name, words.hash)
    return words


def look(root: Path, **settings: object) -> inspection.Inspection:
    return inspect_folder(str(root / "set"), InspectConfig.from_dict({"grid": "2/3", "tile_size": 56, **settings}))


def test_figures_are_those_of_the_samples(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = as_json(look(data))
    monkeypatch.setattr(inspection, "BLOCK", 7)
    found = look(data)
    assert as_json(found) == whole
    pictures = [picture for sample in SAMPLES for picture in sample.pictures]
    headers = [read_header(picture.files[0]) for picture in pictures]
    files = [read_header(file) for picture in pictures for file in picture.files]
    assert found.images == sum(not picture.is_video for picture in pictures)
    assert (found.videos, found.frames) == (len(pictures) - found.images, len(files) - found.images)
    assert found.formats == Counter(header.format for header in files)
    assert whole["distributions"]["width in pixels"]["sum"] == sum(header.width for header in headers)
    assert found.height.quantile(0.5) == np.quantile([h.height for h in headers], 0.5, method="inverted_cdf")
    ratios = dict(zip(inspection.ASPECT_NAMES, found.aspect.counts.tolist(), strict=True))
    assert ratios["from 4:1"] == sum(header.width >= 4 * header.height for header in headers) == 6
    assert ratios["below 1:4"] == sum(4 * header.width < header.height for header in headers) == 6
    counts = [Words(Tokenizer(data / "tokenizer"), ChatConfig()).count(sample) for sample in SAMPLES]
    assert whole["token_counts"]["text_tokens"] == sum(tokens for tokens, _ in counts)
    assert whole["token_counts"]["trained_tokens"] == sum(targets for _, targets in counts)
    costs = [cost(sample.pictures) for sample in SAMPLES]
    assert whole["grid"]["image_tokens"] == sum(tokens for tokens, _ in costs)
    assert whole["grid"]["tiles"] == sum(tiles for _, tiles in costs)
    in_all = [text + tokens - len(s.pictures) for s, (text, _), (tokens, _) in zip(SAMPLES, counts, costs, strict=True)]
    assert found.cut is not None and (found.cut.total.sum, found.cut.total.most) == (sum(in_all), max(in_all))
    assert whole["sources_of_samples_read"] == {"toy": 42, "book": 6, "\x1b[2Jevil": 6}
    assert whole["kinds_of_samples_read"] == {"2 turns": 48, "document": 6}


def cost(pictures: tuple[Picture, ...]) -> tuple[int, int]:
    """(tokens, tiles), one picture after another."""
    alone = sum(not picture.is_video for picture in pictures) == 1
    found = []
    for picture in pictures:
        kind: MediaKind = "video" if picture.is_video else "image" if alone else "one_of_several"
        header = read_header(picture.files[0])
        found.append(plan_image(header.width, header.height, kind, SMALL_GRID, len(picture.files)))
    return sum(plan.tokens for plan in found), sum(plan.tiles for plan in found)


def test_any_width_and_encoding(data: Path) -> None:
    found = look(data)
    for columns in (40, 63, 100, 120):
        lines = written(found, columns).splitlines()
        assert max(map(len, lines)) <= columns, columns
        assert any("█" in line for line in lines)
    assert "\x1b" not in written(found)  # a source's name
    ascii_stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    assert not has_blocks(ascii_stream)
    print_inspection(found, ascii_stream)
    lengths = [bars([Line("a", n), Line("b", 800)], 60)[0].count("█") for n in (0, 100, 400, 800)]
    assert lengths == sorted(lengths) and lengths[0] == 0 and lengths[3] == 2 * lengths[2]


def test_a_picture_of_the_plots(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "inspect", str(data / "set"), *SMALL, "--png", str(tmp_path / "a.png")]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == len(SAMPLES)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert 0.02 < (pixels == (0x2F, 0x74, 0xC0)).all(-1).mean() < 0.6


def test_which_counts_are_shown(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "set", SAMPLES[:9])
    write_tokenizer(tmp_path / "tokenizer")
    inspect = ["data", "inspect", str(tmp_path / "set")]
    assert main(inspect) == 0
    assert f"not counted: `megavlm data index {tmp_path / 'set'}" in capsys.readouterr().out.replace(
        "\n" + " " * 16, " "
    )
    released, clean = count(tmp_path, ChatConfig()), count(tmp_path, ChatConfig(mask="clean"))
    assert main(inspect) == 0
    assert f"there are {', '.join(sorted((released.name, clean.name)))}" in " ".join(capsys.readouterr().out.split())
    assert main([*inspect, "--tokenizer", str(tmp_path / "tokenizer"), "--mask", "clean"]) == 0
    trained = sum(clean.count(sample)[1] for sample in SAMPLES[:9])
    assert f"trained tokens  {trained:,} (" in capsys.readouterr().out
    (tmp_path / "set" / "shard-00000.tar").unlink()
    assert main(inspect) == 0
    assert "9 of 9: `megavlm data lint` says why" in capsys.readouterr().out


def test_mistakes_are_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(data / "set")
    cases = [
        ([str(tmp_path / "none")], "is no folder; check the path"),
        ([str(tmp_path)], f"holds no dataset.json; run `megavlm data index {tmp_path}`"),
        ([folder, "--grid", "5"], "--grid = '5': is no grid; use one of 1, 2a, 2b, 2c, 3, 4, or SIDE/CAP"),
        ([folder, "--grid", "square"], "needs no counting; leave it out"),
        ([folder, "--tokenizer", str(data / "tokenizer"), "--mask", "clean"], "--mask clean`"),
        ([folder, "--png", str(tmp_path / "none" / "a.png")], "name a file in a folder that exists"),
        ([folder, "--read", "-1"], "--read = -1: is negative"),
    ]
    for arguments, problem in cases:
        assert main(["data", "inspect", *arguments]) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("megavlm: error: ") and problem in error


def test_memory_does_not_grow_with_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "BLOCK", 10_000)
    peaks = []
    for samples in (20_000, 200_000):
        make_sparse_index(tmp_path / str(samples), samples, np.arange(samples))
        config = InspectConfig(grid="3", read=0)
        tracemalloc.start()
        found = inspect_folder(str(tmp_path / str(samples)), config)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.images == samples and found.counts is not None and found.counts.text.count == samples
    assert peaks[1] < 1.1 * peaks[0]
