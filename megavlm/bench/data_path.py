"""The whole data path (read, decode, tile, tokenise): ours against transformers' processor in a torch DataLoader.

Both read the same photographs, JPEG files of common sizes, with two workers each: ours from prepared shards with two
threads, theirs from the files with two processes, as training scripts do. A pass is one step of samples; what both
made of it must be the same tokens and, to rounding, the same pixels. Beside them stands our decoder alone, on files
in memory: what the rest of our path costs is the difference.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer as Pieces
from tokenizers import models, pre_tokenizers
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import LlavaOnevisionImageProcessorPil, PreTrainedTokenizerFast

from megavlm.bench.harness import THREADS, Comparison, Pass, Side, timed
from megavlm.data.chat import ChatConfig
from megavlm.data.decode import DecodeConfig, open_decoder
from megavlm.data.decode_jobs import TILED, EncodedPicture
from megavlm.data.formats import SplicedFormat
from megavlm.data.loader import Loader, StepBatches
from megavlm.data.order import SourceConfig, StreamConfig
from megavlm.data.packing import PackLimits
from megavlm.data.sample import Picture, Sample, Turn
from megavlm.data.shards import write_shards
from megavlm.data.step_plan import DataConfig, open_sources
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer
from megavlm.tiles import STAGE_GRIDS, GridConfig, plan_image

TARGET = 1 / 1.8
SIZES = ((640, 480), (480, 640), (800, 600), (1024, 768), (1280, 720), (1024, 899), (1920, 1080), (500, 500))
SAMPLES_PER_STEP = 16
WORKERS = 2
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
_WORDS = "What is in the picture, and what is it made of? A red one."


@contextmanager
def data_path(quick: bool) -> Iterator[Comparison]:
    """Both sides in this process and its workers."""
    torch.set_num_threads(THREADS)
    grid = STAGE_GRIDS["2a" if quick else "3"]
    with TemporaryDirectory() as place:
        root = Path(place)
        count = SAMPLES_PER_STEP if quick else 4 * SAMPLES_PER_STEP
        samples = [_sample(number) for number in range(count)]
        write_tokenizer(root / "tokenizer")
        ours = _our_loader(root, samples, grid)
        order = [[name.index for name in _names(ours.step(step))] for step in range(count // SAMPLES_PER_STEP)]
        yield Comparison(
            benchmark="data-path",
            case=(
                f"{SAMPLES_PER_STEP} JPEG photographs of {len(SIZES)} sizes a pass to tiles of {grid.tile_size} in "
                f"grids up to {grid.max_tiles_per_side}x{grid.max_tiles_per_side}, and their conversations to tokens; "
                f"{WORKERS} workers each, ours with {type(ours.decoder).__name__}"
            ),
            ours=Side("megavlm", _our_passes(ours, order)),
            theirs=Side("transformers", _their_passes(root, samples, grid, order)),
            target=TARGET,
            rounds=2 if quick else 12,
            warmup=1 if quick else 2,
            beside=Side("our decoder alone", _decoder_passes(ours, samples, grid, order)),
        )


def _sample(number: int) -> Sample:
    """A photograph of sorts: smooth shades, edges and grain."""
    width, height = SIZES[number % len(SIZES)]
    draw = np.random.default_rng(number)
    small = draw.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    picture[height // 3 :, width // 4 : width // 2] //= 2
    picture += draw.integers(-12, 13, picture.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    turns = (Turn("user", f"<image>\n{_WORDS}"), Turn("assistant", _WORDS))
    return Sample(f"{number:06d}", (Picture((file.getvalue(),)),), turns)


def write_tokenizer(folder: Path) -> None:
    """One of single bytes, and ChatML's tokens."""
    pieces = Pieces(models.BPE(unk_token="<|endoftext|>", vocab={"<|endoftext|>": 0}, merges=[]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces.model = models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    fast = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|im_end|>", additional_special_tokens=_SPECIAL)
    fast.save_pretrained(folder)


def _our_loader(root: Path, samples: Sequence[Sample], grid: GridConfig) -> Loader:
    tokenizer = Tokenizer(root / "tokenizer")
    tags = (tokenizer.token_of("<image>"), tokenizer.token_of("<video>"))
    assert tags[0] is not None and tags[1] is not None
    words = SplicedFormat(tokenizer, ChatConfig(mask="clean"), grid, (tags[0], tags[1]))
    write_shards([samples], root / "photographs")
    add_token_counts(root / "photographs", words.count, words.name, words.hash)
    source = SourceConfig(name="photographs", weight=1)
    config = DataConfig(
        path=str(root),
        streams=(StreamConfig(samples_per_step=SAMPLES_PER_STEP, sources=(source,)),),
        rows=PackLimits(max_tokens=12_288, rows_multiple=1),
        threads=WORKERS,
    )
    return Loader(
        config,
        words,
        open_sources(config, words),
        open_decoder(TILED, grid, DecodeConfig(threads=WORKERS)),
        lambda tiles: [tuple(range(len(of_row))) for of_row in tiles],
        seed=1,
        data_rank=0,
        data_size=1,
        empty=torch.empty(0, 3 * grid.patch_size**2),
    )


def _names(step: StepBatches) -> list[Any]:
    return list(itertools.chain.from_iterable(step.samples))


def _our_passes(loader: Loader, order: Sequence[Sequence[int]]) -> Callable[[], Pass]:
    steps = itertools.cycle(range(len(order)))

    def run() -> Pass:
        number = next(steps)
        made: list[StepBatches] = []

        def work() -> float:
            made.append(loader.step(number))
            return 0.0

        seconds = timed(work).seconds
        batches = made[0].batches
        assert not made[0].damaged
        pixels = sum(float(batch.media.patches.double().sum()) for batch in batches if batch.media)
        tokens = sum(int((batch.tokens != 0).sum()) for batch in batches)
        return Pass(seconds, pixels / 1e3 + tokens)

    return run


def _decoder_passes(
    loader: Loader, samples: Sequence[Sample], grid: GridConfig, order: Sequence[Sequence[int]]
) -> Callable[[], Pass]:
    steps = itertools.cycle(order)

    def run() -> Pass:
        pictures = [
            EncodedPicture(samples[number].pictures[0].files, plan_image(*SIZES[number % len(SIZES)], "image", grid))
            for number in next(steps)
        ]

        def work() -> float:
            loader.decoder.decode_rows(pictures)
            return 0.0

        return timed(work)

    return run


class _Files(Dataset[Any]):
    """What a training script has: files, a processor, and a collator that pads."""

    def __init__(self, root: Path, samples: Sequence[Sample], grid: GridConfig) -> None:
        self.files = []
        for sample in samples:
            path = root / f"{sample.id}.jpg"
            path.write_bytes(sample.pictures[0].files[0])
            self.files.append(path)
        self.turns, self.grid = [sample.turns for sample in samples], grid
        size = {"height": grid.tile_size, "width": grid.tile_size}
        self.images = LlavaOnevisionImageProcessorPil(
            size=size,
            image_grid_pinpoints=[list(resolution) for resolution in grid.resolutions],
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "tokenizer")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[list[int], torch.Tensor]:
        with Image.open(self.files[number]) as image:
            picture = image.convert("RGB")
        pixels = self.images(picture, return_tensors="pt")["pixel_values"][0]
        text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        for role, said in self.turns[number]:
            text += f"<|im_start|>{role}\n{said}<|im_end|>\n"
        # The processor writes the tag once for each token of the image, and tokenises that.
        tokens = plan_image(picture.width, picture.height, "image", self.grid).tokens
        return self.tokenizer(text.replace("<image>", "<image>" * tokens))["input_ids"], pixels


class _OneStep(Sampler[list[int]]):
    """The samples of one step at a time, in pairs: the workers rest between passes, which belong to the other side."""

    def __init__(self, order: Sequence[Sequence[int]]) -> None:
        self.order, self.step = order, 0

    def __iter__(self) -> Iterator[list[int]]:
        # Asked for twice before the first pass, so it must not be what moves on.
        numbers = list(self.order[self.step % len(self.order)])
        return iter([numbers[first : first + 2] for first in range(0, len(numbers), 2)])

    def __len__(self) -> int:
        return SAMPLES_PER_STEP // 2


def _as_they_are(items: list[Any]) -> list[Any]:
    return items


def _their_passes(
    root: Path, samples: Sequence[Sample], grid: GridConfig, order: Sequence[Sequence[int]]
) -> Callable[[], Pass]:
    steps = _OneStep(order)
    loader: DataLoader[Any] = DataLoader(
        _Files(root, samples, grid),
        batch_sampler=steps,
        num_workers=WORKERS,
        collate_fn=_as_they_are,
        persistent_workers=True,
    )

    def run() -> Pass:
        made: list[Any] = []

        def work() -> float:
            made.extend(itertools.chain.from_iterable(loader))
            return 0.0

        seconds = timed(work).seconds
        steps.step += 1
        used = slice(0, grid.tokens_per_side * grid.patch_size)
        pixels = sum(float(tiles[..., used, used].double().sum()) for _, tiles in made)
        return Pass(seconds, pixels / 1e3 + sum(len(tokens) for tokens, _ in made))

    return run
