"""The loader: the same samples whatever the ranks, blanks for what cannot be read, steps made ready ahead."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import largest_file
from qwen_hf import write_tokenizer

from megavlm.batch import SplicedMedia, TextBatch
from megavlm.data.chat import ChatConfig
from megavlm.data.decode import PilDecoder
from megavlm.data.decode_jobs import TILED
from megavlm.data.formats import SampleFormat, SplicedFormat
from megavlm.data.ledger import SIZES, LedgerWriter, order_of_ledger
from megavlm.data.loader import Loader, StepBatches
from megavlm.data.order import SourceConfig, StreamConfig
from megavlm.data.packing import PackLimits
from megavlm.data.shards import write_shards
from megavlm.data.step_plan import DataConfig, open_sources
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import SampleKind, ToyWorld
from megavlm.errors import DataError
from megavlm.tiles import GridConfig
from megavlm.train.work import work_of_plan

GRID = GridConfig(tile_size=56, max_tiles_per_side=2, cap_tiles=3)
STEP = 12
SOURCES: dict[SampleKind, int] = {"chat": 40, "multi_image": 9, "text": 20}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared toy data sets, and a tokenizer."""
    root = tmp_path_factory.mktemp("data")
    write_tokenizer(root / "tokenizer")
    words = words_of(root)
    world = ToyWorld(sizes=((64, 64), (150, 64)))
    for kind, count in SOURCES.items():
        write_shards([list(toy_samples(kind, "train", 0, count, world))], root / kind)
        add_token_counts(root / kind, words.count, words.name, words.hash)
    return root


def words_of(root: Path) -> SampleFormat:
    tokenizer = Tokenizer(root / "tokenizer")
    tags = [tokenizer.token_of(tag) for tag in ("<image>", "<video>")]
    return SplicedFormat(tokenizer, ChatConfig(), GRID, (int(tags[0] or 0), int(tags[1] or 0)))


def config_of(root: Path, **changes: Any) -> DataConfig:
    sources = tuple(SourceConfig(name=name, epochs=2) for name in SOURCES)
    return DataConfig(
        path=str(root),
        streams=(StreamConfig(samples_per_step=STEP, sources=sources),),
        rows=PackLimits(max_tokens=512, rows_multiple=4, length_multiple=8),
        **changes,
    )


def all_pictures(tiles: Any) -> list[tuple[int, ...]]:
    return [tuple(range(len(of_row))) for of_row in tiles]


def loader_of(root: Path, rank: int = 0, ranks: int = 1, own: Any = all_pictures, **changes: Any) -> Loader:
    config, words = config_of(root, **changes), words_of(root)
    return Loader(
        config,
        words,
        open_sources(config, words),
        PilDecoder(TILED, GRID),
        own,
        seed=5,
        data_rank=rank,
        data_size=ranks,
        empty=torch.empty(0, 3 * GRID.patch_size**2),
    )


def rows_of(step: StepBatches) -> list[tuple[Any, TextBatch]]:
    return [
        (tuple((name.source, name.index) for name in names), batch)
        for names, batch in zip(step.samples, step.batches, strict=True)
    ]


def test_ranks_share_out_the_same_rows(data: Path) -> None:
    whole = loader_of(data)
    for step in (0, 3, whole.planner.order.steps - 1):  # type: ignore[operator]
        rows = dict(rows_of(whole.step(step)))
        for ranks in (2, 4):
            parts = [rows_of(loader_of(data, rank, ranks).step(step)) for rank in range(ranks)]
            assert len({len(part) for part in parts}) == 1
            shared = dict(itertools.chain.from_iterable(parts))
            assert shared.keys() == rows.keys()
            for names, batch in shared.items():
                assert torch.equal(batch.tokens, rows[names].tokens)
                assert torch.equal(batch.loss_weights, rows[names].loss_weights)
                assert batch.media is not None and rows[names].media is not None
                assert torch.equal(batch.media.patches, rows[names].media.patches)


def test_the_work_of_a_step_is_what_its_batches_hold(data: Path) -> None:
    found = loader_of(data).step(0)
    work = work_of_plan(found.plan)
    lengths, seeing, row_tokens, tiles, images = [], 0, 0, 0, 0
    for batch, names in zip(found.batches, found.samples, strict=True):
        assert batch.cu_seqlens is not None and batch.media is not None
        of_row = batch.cu_seqlens.diff().tolist()[: len(names)]  # behind the samples stands padding
        lengths += of_row
        seeing += sum(length for length, name in zip(of_row, names, strict=True) if name.source != "text")
        row_tokens, tiles = row_tokens + batch.tokens.numel(), tiles + batch.media.images
        images += len(batch.media.tiles)
    assert (work.samples, work.rows, work.row_tokens) == (STEP, len(found.batches), row_tokens)
    assert (work.tokens, work.squared_lengths) == (sum(lengths), sum(length**2 for length in lengths))
    assert (work.images, work.tiles, work.seeing_tokens) == (images, tiles, seeing)
    assert 0 < work.seeing_tokens < work.tokens < work.row_tokens


def test_every_sample_is_seen_twice_in_two_epochs(data: Path) -> None:
    loader = loader_of(data)
    seen: dict[Any, int] = {}
    for step in range(loader.planner.order.steps or 0):
        for name in itertools.chain.from_iterable(loader.step(step).samples):
            seen[name.source, name.index] = seen.get((name.source, name.index), 0) + 1
    assert seen == {(source, index): 2 for source, count in SOURCES.items() for index in range(count)}


def test_steps_ahead_are_the_steps_themselves(data: Path) -> None:
    for ahead, threads in ((0, 1), (1, 2), (2, 3), (3, 4), (2, 0)):
        loader = loader_of(data, ahead=ahead, threads=threads)
        found = list(loader.steps(2, 6))
        assert [step.step for step in found] == [2, 3, 4, 5]
        for step in found:
            expected = rows_of(loader_of(data).step(step.step))
            assert [names for names, _ in rows_of(step)] == [names for names, _ in expected]
            assert all(torch.equal(a.tokens, b.tokens) for (_, a), (_, b) in zip(rows_of(step), expected, strict=True))


def test_a_rank_holds_the_pixels_of_its_own_pictures(data: Path) -> None:
    def every_other(tiles: Any) -> list[tuple[int, ...]]:
        return [tuple(range(0, len(of_row), 2)) for of_row in tiles]

    whole, half = loader_of(data).step(1), loader_of(data, own=every_other).step(1)
    for (_, full), (_, part) in zip(rows_of(whole), rows_of(half), strict=True):
        assert isinstance(part.media, SplicedMedia) and isinstance(full.media, SplicedMedia)
        pictures = full.media.patches.split([tiles * GRID.tokens_per_tile for tiles in full.media.tiles])
        held = part.media.held or ()
        assert held == tuple(range(0, len(pictures), 2)) and part.media.tiles == full.media.tiles
        assert torch.equal(part.media.patches, torch.cat([full.media.patches[:0], *(pictures[n] for n in held)]))


def test_damage_leaves_a_blank_and_all_others_as_they_were(data: Path, tmp_path: Path) -> None:
    """A bit of a picture, one of words, and a shard that is gone."""
    import shutil

    shutil.copytree(data, tmp_path / "data")
    whole = loader_of(data)
    step = next(s for s in range(4) if any(n.source == "chat" for row in whole.step(s).samples for n in row))
    expected = whole.step(step)
    victim = next(name for row in expected.samples for name in row if name.source == "chat")
    source = next(source for source in whole.sources if source.name == "chat")
    rows = source.index.rows([victim.index])
    for place, name in ((rows.files, "picture"), (rows.words, "words")):
        shard = tmp_path / "data" / "chat" / source.index.shard_names[0]
        content = bytearray(shard.read_bytes())
        content[int(place.offset[0]) + int(place.size[0]) // 2] ^= 4
        shard.write_bytes(bytes(content))
        found = loader_of(tmp_path / "data").step(step)
        assert [(one.sample.source, one.sample.index) for one in found.damaged] == [("chat", victim.index)], name
        assert "checksum" in found.damaged[0].problem
        assert_alike_but_one(expected, found)
        content[int(place.offset[0]) + int(place.size[0]) // 2] ^= 4
        shard.write_bytes(bytes(content))
    shard.unlink()
    found = loader_of(tmp_path / "data").step(step)
    assert {one.sample.source for one in found.damaged} == {"chat"}


def assert_alike_but_one(expected: StepBatches, found: StepBatches) -> None:
    (damage,) = found.damaged
    assert found.samples == expected.samples
    for row, (old, new) in enumerate(zip(expected.batches, found.batches, strict=True)):
        assert old.tokens.shape == new.tokens.shape and old.cu_seqlens is not None
        assert isinstance(old.media, SplicedMedia) and isinstance(new.media, SplicedMedia)
        assert old.media.tiles == new.media.tiles
        if row != damage.row:
            assert torch.equal(old.tokens, new.tokens) and torch.equal(old.media.patches, new.media.patches)
            continue
        start, end = old.cu_seqlens[damage.document : damage.document + 2].tolist()
        others = torch.ones(old.tokens.size(1), dtype=torch.bool)
        others[start:end] = False
        assert torch.equal(old.tokens[:, others], new.tokens[:, others])
        assert torch.equal(old.loss_weights[:, others], new.loss_weights[:, others])


@pytest.mark.parametrize("is_full", [False, True])
def test_a_full_ledger_names_every_sample(data: Path, tmp_path: Path, is_full: bool) -> None:
    loader = loader_of(data, full_ledger=is_full)
    step, places = loader.step(3), np.arange(loader.config.samples_per_step)
    names = [source.name for source in loader.sources]
    LedgerWriter(tmp_path, 0, {"data": loader.config.to_dict(), "seed": 5}, 3).write(step, places, [], names)
    (line,) = (json.loads(text) for text in (tmp_path / "rank-00000.jsonl").read_text().splitlines())
    expected = loader.planner.order.step(3)
    told = {(name, index, epoch) for name, pairs in line.get("names", {}).items() for index, epoch in pairs}
    columns = (expected.source, expected.index, expected.epoch)
    everything = {(names[int(s)], int(i), int(e)) for s, i, e in zip(*columns, strict=True)}
    assert told == (everything if is_full else set())


def test_a_full_disk_costs_the_ledger_nothing(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = loader_of(data)
    places, names = np.arange(loader.config.samples_per_step), [source.name for source in loader.sources]
    writer = LedgerWriter(tmp_path, 0, {"data": loader.config.to_dict(), "seed": 5}, 0)
    path = tmp_path / "rank-00000.jsonl"
    writer.write(loader.step(0), places, [], names)
    size = path.stat().st_size
    with largest_file(size + 10):
        for step in (1, 2):
            writer.write(loader.step(step), places, [], names)
    assert path.stat().st_size == size
    writer.write(loader.step(3), places, [], names)
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [0, 1, 2, 3]
    with largest_file(path.stat().st_size):
        writer.write(loader.step(4), places, [], names)
        writer.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} cannot be written (File too large); its lines are kept until it can",
        f"{path} is written again; it lacks nothing",
        f"{path} cannot be written (File too large); its lines are kept until it can",
        f"{path} lacks its last 1 lines, for which there was no room",
    ]


def test_a_data_set_that_has_grown_is_another_order(data: Path, tmp_path: Path) -> None:
    settings = {"data": config_of(data).to_dict(), "seed": 5, SIZES: dict(SOURCES)}
    LedgerWriter(tmp_path, 0, settings, 0).close()
    LedgerWriter(tmp_path, 0, settings, 0).close()
    assert order_of_ledger(tmp_path).steps
    grown = {**settings, SIZES: {**SOURCES, "text": 21}}
    with pytest.raises(DataError, match="in which text had 20 samples, so its order.*it has 21 now"):
        LedgerWriter(tmp_path, 0, grown, 0)
    (tmp_path / "data.json").write_text(json.dumps(grown))
    with pytest.raises(DataError, match="in which text had 21 samples, and it has 20 now"):
        order_of_ledger(tmp_path)
