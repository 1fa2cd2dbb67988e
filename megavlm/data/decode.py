"""Encoded pictures to the patch rows of their tiles: the decoders, and how one is chosen.

| decoder | decodes | resizes | its pixels |
|---|---|---|---|
| `exact` | PIL | PIL | to the bit those of the public processors |
| `pil` | PIL | torch on the CPU | 16 values in a million 2 of 255 off, none more |
| `dali` on a CPU | DALI | torch on the CPU | to the bit those of `pil` |
| `dali` on a GPU | DALI (nvJPEG) | DALI | close to those |

`auto` is `dali` where DALI is installed, else `pil`. Whatever the decoder, limits are checked by the header before
anything is decoded, a damaged picture leaves the others alone and ends as black tiles with its error, and padding,
cutting, normalising and casting are `tile_pack`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megavlm.config import Config, require
from megavlm.data.decode_jobs import Batch, EncodedPicture, Job, PixelRule, batch_of, blank_table
from megavlm.data.images import DEFAULT_LIMITS, ImageLimits, center_square, opened, rgb_pixels, upright
from megavlm.data.tile_images import Pixels, Resize, resize_bicubic, resize_quick, squared
from megavlm.errors import DataError, UnavailableError
from megavlm.tiles import GridConfig
from megavlm_kernels import tile_pack

_PLAIN_MODES = ("RGB", "L")
"""Modes of which it makes no difference whether they are resized before they become RGB, or after."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(Config):
    """How pictures are decoded."""

    decoder: Literal["auto", "dali", "pil", "exact"] = "auto"
    """Who decodes and resizes; auto: DALI where it is installed, else PIL with torch's resize."""
    threads: int = 2
    """Threads that decode and resize on the CPU, in each process."""
    limits: ImageLimits = DEFAULT_LIMITS
    """What a picture may cost."""

    def check(self) -> None:
        require(self.threads >= 1, self, "threads", "is below 1", "use 1 or more")


DEFAULT_DECODE = DecodeConfig()
CPU = torch.device("cpu")


class Decoded(NamedTuple):
    """What became of a batch of pictures."""

    patches: Tensor
    """[tiles of all pictures * patches of one, 3 * patch_size**2]: black where a picture could not be decoded."""
    problems: tuple[DataError | None, ...]
    """Of each picture, why it could not."""

    @property
    def ok(self) -> list[bool]:
        """Whether each picture could."""
        return [problem is None for problem in self.problems]


class Decoder(ABC):
    """Decodes batches one after another, in a thread of its own, while its caller goes on."""

    def __init__(
        self, rule: PixelRule, grid: GridConfig, config: DecodeConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._rule, self._grid, self._config = rule, grid, config
        self._device, self._dtype = device, dtype
        self._pool = ThreadPoolExecutor(config.threads, "decode")
        self._conductor = ThreadPoolExecutor(1, "decode-batch")

    def submit(self, pictures: Sequence[EncodedPicture]) -> Future[Decoded]:
        """Begin with a batch once those before it are done; `.result()` waits for it."""
        return self._conductor.submit(self._decode, tuple(pictures))

    def decode_rows(self, pictures: Sequence[EncodedPicture]) -> Decoded:
        """The patch rows of a batch, its pictures in this order."""
        return self.submit(pictures).result()

    def close(self) -> None:
        """End the threads; batches not yet begun are dropped."""
        self._conductor.shutdown(cancel_futures=True)
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _fill(self, jobs: Sequence[Job], buffer: Tensor) -> list[DataError | None]:
        """Decode the files and store their resized pictures, or say why that failed."""

    def _decode(self, pictures: tuple[EncodedPicture, ...]) -> Decoded:
        own = (self._grid.tile_size, self._grid.patch_size)
        for picture in pictures:
            assert (picture.plan.grid.tile_size, picture.plan.grid.patch_size) == own, picture.plan.grid
        with _on(self._device):
            batch = batch_of(pictures, self._rule)
            buffer = torch.empty(batch.bytes, dtype=torch.uint8, device=self._device)
            for job, problem in zip(batch.jobs, self._fill(batch.jobs, buffer), strict=True):
                batch.problems[job.picture] = batch.problems[job.picture] or problem
            return Decoded(self._patches(pictures, batch, buffer), tuple(batch.problems))

    def _patches(self, pictures: Sequence[EncodedPicture], batch: Batch, buffer: Tensor) -> Tensor:
        each = zip(pictures, batch.tables, batch.problems, strict=True)
        tables = [table if problem is None else blank_table(picture.plan) for picture, table, problem in each]
        table = np.concatenate([np.empty((0, 5), np.int64), *tables])
        return tile_pack(
            buffer,
            torch.from_numpy(table).to(self._device),
            patch_size=self._grid.patch_size,
            patches_per_side=self._grid.tokens_per_side,
            mean=self._rule.mean,
            std=self._rule.std,
            dtype=self._dtype,
        )

    def _each(self, work: Callable[[Job], Any], jobs: Sequence[Job]) -> list[Any]:
        """The work done on each job, in threads."""
        return list(self._pool.map(work, jobs))


class PilDecoder(Decoder):
    """Decodes by PIL, one picture a thread."""

    def __init__(
        self,
        rule: PixelRule,
        grid: GridConfig,
        config: DecodeConfig = DEFAULT_DECODE,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        resize: Resize = resize_quick,
    ) -> None:
        super().__init__(rule, grid, config, device, dtype)
        self._resize = resize

    def _fill(self, jobs: Sequence[Job], buffer: Tensor) -> list[DataError | None]:
        return self._each(partial(fill_by_pil, self._rule, self._resize, self._config.limits, buffer), jobs)


def open_decoder(
    rule: PixelRule,
    grid: GridConfig,
    config: DecodeConfig = DEFAULT_DECODE,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """The decoder that the settings name, for tiles of that grid's size."""
    if config.decoder == "dali" or (config.decoder == "auto" and has_dali()):
        if not has_dali():
            problem = "NVIDIA DALI is not installed"
            remedy = "pip install nvidia-dali-cuda130 (or -cuda120, as torch's CUDA is), or use pil"
            raise UnavailableError("decoder", config.decoder, problem, remedy)
        decoder: Decoder = import_module("megavlm.data.decode_dali").DaliDecoder(rule, grid, config, device, dtype)
        return decoder
    resize = resize_bicubic if config.decoder == "exact" else resize_quick
    return PilDecoder(rule, grid, config, device, dtype, resize)


def has_dali() -> bool:
    """Whether DALI can be imported."""
    try:
        import_module("nvidia.dali")
    except ImportError:
        return False
    return True


def decode_problems(pictures: Sequence[EncodedPicture], rule: PixelRule, limits: ImageLimits) -> list[DataError | None]:
    """Of each picture why it cannot be decoded and resized, by PIL and in this thread; the pixels are dropped."""
    batch = batch_of(pictures, rule)
    buffer = torch.empty(batch.bytes, dtype=torch.uint8)
    for job in batch.jobs:
        if batch.problems[job.picture] is None:
            batch.problems[job.picture] = fill_by_pil(rule, resize_quick, limits, buffer, job)
    return batch.problems


def fill_by_pil(rule: PixelRule, resize: Resize, limits: ImageLimits, buffer: Tensor, job: Job) -> DataError | None:
    """Decode a file and store its resized pictures, or say why that failed."""
    try:
        with opened(job.file, job.where, limits) as image:
            picture = upright(image)
            check_size(picture.size, job)
            pixels = None if rule.crops and picture.mode not in _PLAIN_MODES else rgb_pixels(picture)
    except DataError as error:
        return error
    if pixels is None:
        _store_square(picture, job, buffer)
    else:
        store_resized(resize, buffer, job, pixels)
    return None


def store_resized(resize: Resize, buffer: Tensor, job: Job, pixels: Pixels) -> None:
    """Store what a job makes of its decoded picture [height, width, 3]."""
    source = squared(pixels) if job.is_squared else pixels
    for place in job.places:
        place.store(place.kept(resize(source, place.width, place.height)), buffer)


def check_size(size: tuple[int, int], job: Job) -> None:
    """Refuse a picture of another (width, height) than its plan was made for."""
    planned = (job.plan.width, job.plan.height)
    if size != planned:
        found, expected = (f"{width}x{height}" for width, height in (size, planned))
        raise DataError(job.where, found, f"its index says {expected}", "index the data set again")


def _store_square(picture: Image.Image, job: Job, buffer: Tensor) -> None:
    """A palette, or transparent, or of inks: resized in its own colours, by PIL."""
    for place in job.places:
        place.store(np.asarray(center_square(picture, job.plan.grid.tile_size)), buffer)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes it this thread's device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
