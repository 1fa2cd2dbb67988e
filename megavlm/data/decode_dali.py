"""Decoding by NVIDIA DALI: one graph for each family, whose decoder is `cpu` or `mixed` as the device is.

DALI gets what it decodes to the bit as PIL does, told by the header: JPEG, PNG and WebP in RGB or grey of 8 bits, that
lie upright, have one frame and no transparency and end where they should. All else is PIL's: CMYK, palettes, alpha, 16
bits, EXIF and XMP orientations, animations, WebP in its extended form, other formats.

On a CPU the graph decodes only: its resize takes 7 to 30 times as long as torch's, and is further from PIL's. On a GPU
the graph resizes as well, rows and columns apart and in PIL's order, each rounded: so black and white edges are clipped
where PIL clips them.

DALI raises for a whole batch when one picture is damaged. Batches go to it in pieces; a piece that it refuses is
decoded by PIL, which finds the picture that is to blame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor

from megavlm.data.decode import CPU, DEFAULT_DECODE, DecodeConfig, Decoder, check_size, fill_by_pil, store_resized
from megavlm.data.decode_jobs import EncodedPicture, Job, PixelRule, Place, batch_of
from megavlm.data.images import ImageLimits, has_metadata_behind_pixels, opened, orientation
from megavlm.data.tile_images import SQUARE_BORDER, is_vertical_first, resize_quick
from megavlm.errors import DataError, UnavailableError
from megavlm.log import get_logger
from megavlm.tiles import GridConfig, plan_image

PIECE_FILES = 32
"""What is decoded together, and with it refused together."""
PIECE_PIXELS = 64_000_000
"""0.2 GB before they are resized; a larger picture is a piece by itself."""

_LOG = get_logger(__name__)
_NO_PLACE = Place(1, 1, (0, 0, 1, 1), 0)
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "WEBP": b""}
"""How files end that DALI may decode; one that was cut makes it raise, and print."""
_PNG_DEPTH, _WEBP_CHUNK = 24, slice(12, 16)
"""Where their headers say how many bits a sample has, and of which form the file is."""


class DaliDecoder(Decoder):
    """Decodes by DALI what suits it, the rest by PIL."""

    def __init__(
        self,
        rule: PixelRule,
        grid: GridConfig,
        config: DecodeConfig = DEFAULT_DECODE,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        resizes: bool | None = None,
    ) -> None:
        """`resizes`: in the graph, in place of torch; None: on a GPU, where it must."""
        super().__init__(rule, grid, config, device, dtype)
        self._is_on_gpu = device.type == "cuda"
        self._resizes = self._is_on_gpu if resizes is None else resizes
        assert self._resizes or not self._is_on_gpu
        self._pipeline: Any = None
        self._has_warned = False
        try:
            self._conductor.submit(self._try_out).result()
        except UnavailableError:
            self.close()
            raise

    def _fill(self, jobs: Sequence[Job], buffer: Tensor) -> list[DataError | None]:
        by_pil = partial(fill_by_pil, self._rule, resize_quick, self._config.limits, buffer)
        suits = self._each(partial(suits_dali, self._config.limits), jobs)
        rest = [number for number, is_dalis in enumerate(suits) if not is_dalis]
        running = {number: self._pool.submit(by_pil, jobs[number]) for number in rest}
        for piece in _pieces(jobs, suits):
            if not self._run([jobs[number] for number in piece], buffer):
                running |= {number: self._pool.submit(by_pil, jobs[number]) for number in piece}
        return [running[number].result() if number in running else None for number in range(len(jobs))]

    def _run(self, jobs: Sequence[Job], buffer: Tensor) -> bool:
        """Decode the files and store their resized pictures; False where DALI refused one, and nothing counts."""
        try:
            outputs = self._outputs(jobs)
        except Exception as error:  # of several types, as the reasons differ
            self._pipeline = None  # it cannot be used again
            self._warn(error, len(jobs))
            return False
        self._store(jobs, outputs, buffer)
        return True

    def _outputs(self, jobs: Sequence[Job]) -> Sequence[Any]:
        """Of each output of the graph, what it makes of each file."""
        if self._pipeline is None:
            self._pipeline = self._build()
        for name, values in self._inputs(jobs).items():
            self._pipeline.feed_input(name, values)
        outputs: Sequence[Any] = self._pipeline.run()
        return outputs

    def _store(self, jobs: Sequence[Job], outputs: Sequence[Any], buffer: Tensor) -> None:
        if not self._resizes:
            (pixels,) = outputs
            decoded = [np.asarray(pixels[number]) for number in range(len(jobs))]
            list(self._pool.map(partial(store_resized, resize_quick, buffer), jobs, decoded))
            return
        for number, job in enumerate(jobs):
            for place, output in zip(job.places, outputs, strict=False):
                pixels = output[number]
                place.view(buffer).copy_(torch.from_dlpack(pixels) if self._is_on_gpu else torch.tensor(pixels))
        if self._is_on_gpu:
            # DALI may write over its outputs as soon as they are dropped here.
            torch.cuda.current_stream(self._device).synchronize()

    def _inputs(self, jobs: Sequence[Job]) -> dict[str, list[Any]]:
        """What the graph takes, by name."""
        given: dict[str, list[Any]] = {"files": [np.frombuffer(job.file, np.uint8) for job in jobs]}
        if not self._resizes:
            return given
        given["window"] = [_window(job, self._rule) for job in jobs]
        for number in range(_outputs_of(self._rule)):
            places = [(*job.places, _NO_PLACE)[number] for job in jobs]
            given[f"size_{number}"] = [np.array((place.height, place.width), np.float32) for place in places]
            given[f"way_{number}"] = [_halfway(job, place) for job, place in zip(jobs, places, strict=True)]
        return given

    def _build(self) -> Any:
        pipeline = pipeline_def(
            batch_size=PIECE_FILES,
            num_threads=self._config.threads,
            device_id=(self._device.index or 0) if self._is_on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )(_graph)(self._rule, "mixed" if self._is_on_gpu else "cpu", self._resizes)
        pipeline.build()
        return pipeline

    def _try_out(self) -> None:
        """Decode a sound picture, so that what is wrong with DALI itself is not taken for damage later."""
        stream = BytesIO()
        Image.new("RGB", (16, 16)).save(stream, "JPEG")
        plan = plan_image(16, 16, "image", self._grid)
        try:
            self._outputs(batch_of([EncodedPicture((stream.getvalue(),), plan)], self._rule).jobs)
        except Exception as error:
            problem = f"NVIDIA DALI does not work here: {_reason(error)}"
            raise UnavailableError("decoder", "dali", problem, "run megavlm doctor, or use pil") from None

    def _warn(self, error: Exception, files: int) -> None:
        if not self._has_warned:
            _LOG.warning("DALI refused %d files, which PIL decodes: %s (said once)", files, _reason(error))
        self._has_warned = True


def suits_dali(limits: ImageLimits, job: Job) -> bool:
    """Whether DALI may decode the file, and makes of it what PIL does."""
    try:
        with opened(job.file, job.where, limits) as image:
            check_size(image.size, job)
            return (
                image.format in _ENDS
                and image.mode in ("RGB", "L")
                and job.file.endswith(_ENDS[image.format])
                and "transparency" not in image.info
                and getattr(image, "n_frames", 1) == 1
                and (image.format != "PNG" or (job.file[_PNG_DEPTH] == 8 and not has_metadata_behind_pixels(image.fp)))
                and (image.format != "WEBP" or job.file[_WEBP_CHUNK] in (b"VP8 ", b"VP8L"))
                and orientation(image, Image.Image.getexif) == 1
            )
    except DataError:
        return False  # PIL will say why


def _graph(rule: PixelRule, device: str, resizes: bool) -> Any:
    """Of each file its pixels [height, width, 3]; or, where the graph resizes, those of its places."""
    pixels = fn.decoders.image(
        fn.external_source(name="files", dtype=types.UINT8, ndim=1),
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    if not resizes:
        return pixels
    window = fn.external_source(name="window", dtype=types.INT32, ndim=1)
    if rule.crops:
        return _cut(_resized(pixels, 0), window)
    squared = _cut(pixels, window)
    return tuple(_resized(squared, number) for number in range(_outputs_of(rule)))


def _resized(pixels: Any, number: int) -> Any:
    """PIL's order, and its rounding in between."""
    for name in ("way", "size"):
        size = fn.external_source(name=f"{name}_{number}", dtype=types.FLOAT, ndim=1)
        pixels = fn.resize(pixels, size=size, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8)
    return pixels


def _cut(pixels: Any, window: Any) -> Any:
    """A window that may be larger than the picture; grey is beyond."""
    return fn.slice(
        pixels,
        start=window[0:2],
        shape=window[2:4],
        axes=(0, 1),
        out_of_bounds_policy="pad",
        fill_values=SQUARE_BORDER,
    )


def _outputs_of(rule: PixelRule) -> int:
    """Sizes that a picture may be resized to: a crop, or a tile and the grid's image."""
    return 1 if rule.crops else 2


def _window(job: Job, rule: PixelRule) -> NDArray[np.int32]:
    """(top, left, height, width) of what `_cut` leaves."""
    width, height = job.plan.width, job.plan.height
    if rule.crops:
        left, top, right, bottom = job.places[0].box
        window = (top, left, bottom - top, right - left)
    elif job.is_squared:
        side = max(width, height)
        window = (-((side - height) // 2), -((side - width) // 2), side, side)
    else:
        window = (0, 0, height, width)
    return np.array(window, np.int32)


def _halfway(job: Job, place: Place) -> NDArray[np.float32]:
    """(height, width) once rows or columns are resized."""
    width, height = job.plan.width, job.plan.height
    if job.is_squared:
        width = height = max(width, height)
    is_vertical = is_vertical_first(width, height, place.width, place.height)
    return np.array((place.height, width) if is_vertical else (height, place.width), np.float32)


def _pieces(jobs: Sequence[Job], suits: Sequence[bool]) -> Iterator[list[int]]:
    """The numbers of DALI's jobs, in pieces."""
    piece: list[int] = []
    pixels = 0
    for number, job in enumerate(jobs):
        if not suits[number]:
            continue
        if piece and (len(piece) == PIECE_FILES or pixels + job.pixels > PIECE_PIXELS):
            yield piece
            piece, pixels = [], 0
        piece.append(number)
        pixels += job.pixels
    if piece:
        yield piece


def _reason(error: Exception) -> str:
    """The line of an error of DALI's that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "ample" in line or "CUDA" in line), (lines or [type(error).__name__])[0])
