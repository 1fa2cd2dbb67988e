"""What commands that look at a data set are told of a run to come: its tokenizer, its template, its grid."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from megavlm.config import Config, require
from megavlm.data.chat import ChatConfig
from megavlm.data.decode import DecodeConfig, Decoder, open_decoder
from megavlm.data.decode_jobs import CLIP, TILED, PixelRule
from megavlm.data.formats import AttendedFormat, SampleFormat, SplicedFormat, Words
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG, Sample
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import ConfigError, WeightsError
from megavlm.tiles import STAGE_GRIDS, GridConfig

NO_GRID = "square"
GRIDS = f"one of {', '.join(STAGE_GRIDS)}, or SIDE/CAP such as 3/5, or {NO_GRID} for the middle square"
ATTENDED_TEMPLATES = ("zephyr", "vicuna")
"""InfiMM's, whose pictures are middle squares."""
_NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True)
class WordsConfig(Config):
    """How words become tokens."""

    tokenizer: str | None = None
    """Folder with the tokenizer of the model, as `megavlm import-hf` writes it."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """How conversations become tokens."""

    @property
    def words(self) -> Words:
        """An error where no tokenizer is named, or it cannot be read."""
        return Words(self.open_tokenizer(), self.chat)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        if self.tokenizer is None:
            raise ConfigError("--tokenizer", None, "is missing", "name the folder of the model's tokenizer")
        return Tokenizer(self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class LookConfig(WordsConfig):
    """How samples are read."""

    grid: str | None = None
    """How pictures are cut: a stage of Aquila-VL (1, 2a, 2b, 2c, 3, 4), or SIDE/CAP, which is up to SIDE x SIDE tiles
    and at most the tokens of CAP tiles beside the base tile; or square, their middle one, as InfiMM's. By default that
    for the templates zephyr and vicuna, and 3 for others."""
    tile_size: int | None = None
    """Pixels along a tile's side; by default 384, and 224 for a middle square."""
    patch_size: int = 14
    """Pixels along a patch's side."""

    def check(self) -> None:
        require(self.tile_size is None or self.tile_size >= 1, self, "tile_size", "is below 1", "use for example 384")
        require(self.patch_size >= 1, self, "patch_size", "is below 1", "use for example 14")
        assert self.cut is None or isinstance(self.cut, GridConfig)

    @property
    def cut(self) -> GridConfig | None:
        """How pictures are cut; None where their middle square is taken."""
        name = self.grid or (NO_GRID if self.chat.template in ATTENDED_TEMPLATES else "3")
        return parse_grid(name, self.tile_size, self.patch_size)

    @property
    def format(self) -> SampleFormat:
        """A way to read samples with this tokenizer and these tiles."""
        tokenizer = self.open_tokenizer()
        image, video = image_token(tokenizer), tokenizer.token_of(VIDEO_TAG)
        if self.cut is not None:
            return SplicedFormat(tokenizer, self.chat, self.cut, (image, _NO_TOKEN if video is None else video))
        return AttendedFormat(tokenizer, self.chat, image, self.square)

    @property
    def square(self) -> GridConfig:
        """What is taken of pictures that are not cut."""
        return GridConfig(tile_size=self.tile_size or 224, patch_size=self.patch_size, tiling="single")

    @property
    def rule(self) -> PixelRule:
        """What becomes of the format's pictures."""
        return CLIP if self.cut is None else TILED

    def decoder(self, threads: int) -> Decoder:
        """What decodes pictures for the format."""
        config = DecodeConfig(decoder="exact", threads=threads)
        return open_decoder(self.rule, self.square if self.cut is None else self.cut, config)

    @property
    def grid_in_words(self) -> str:
        """How pictures are cut, for reports."""
        cut = self.cut
        if cut is None:
            return f"middle squares of {self.square.tile_size} pixels, attended to"
        if cut.tiling == "single":
            return f"one tile of {cut.tile_size} pixels"
        side = cut.max_tiles_per_side
        return f"up to {side} x {side} tiles of {cut.tile_size} pixels and a base tile, cap {cut.cap_tiles}"


def parse_grid(name: str, tile_size: int | None = None, patch_size: int = 14) -> GridConfig | None:
    """The grid of that name; None for a middle square."""
    if name == NO_GRID:
        return None
    tile_size = tile_size or 384
    if name in STAGE_GRIDS:
        return STAGE_GRIDS[name].replace(tile_size=tile_size, patch_size=patch_size)
    if not re.fullmatch(r"[0-9]{1,3}/[0-9]{1,4}", name, re.ASCII):
        raise ConfigError("--grid", name, "is no grid", f"use {GRIDS}")
    side, cap = map(int, name.split("/"))
    return GridConfig(max_tiles_per_side=side, cap_tiles=cap, tile_size=tile_size, patch_size=patch_size)


def image_token(tokenizer: Tokenizer) -> int:
    """The token that stands for a picture."""
    token = tokenizer.token_of(IMAGE_TAG)
    if token is None:
        remedy = "take a folder that `megavlm import-hf` wrote, or add it to the special tokens"
        raise WeightsError("tokenizer of", str(tokenizer.folder), f"has no token for {IMAGE_TAG}", remedy)
    return token


@dataclass(frozen=True)
class CountWords:
    """`Words.count` for worker processes, each of which opens the tokenizer once."""

    tokenizer: str
    chat: ChatConfig

    def __call__(self, sample: Sample) -> tuple[int, int]:
        return _words(self.tokenizer, self.chat).count(sample)


@functools.lru_cache(maxsize=1)
def _words(tokenizer: str, chat: ChatConfig) -> Words:
    return Words(Tokenizer(tokenizer), chat)
