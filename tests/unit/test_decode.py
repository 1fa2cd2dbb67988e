"""Decoders: pixels of both families, limits, damage that stays with its picture, batches decoded ahead."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded, huge_png, noise, turned_exif
from PIL import Image
from torch import Tensor

from megavlm.data.decode import DecodeConfig, Decoder, PilDecoder, has_dali, open_decoder
from megavlm.data.decode_jobs import CLIP, TILED, EncodedPicture
from megavlm.data.images import ImageLimits, clip_pixels, decode_image
from megavlm.data.tile_images import resize_bicubic, resize_quick, tile_pixels
from megavlm.errors import ConfigError, UnavailableError
from megavlm.tiles import GridConfig, MediaKind, patch_rows, plan_image

GRID = GridConfig(tile_size=98, max_tiles_per_side=3, cap_tiles=5)
SQUARE = GridConfig(tile_size=56, tiling="single")
EXACT, PIL = DecodeConfig(decoder="exact"), DecodeConfig(decoder="pil")


def picture(image: Image.Image, media: MediaKind = "image", file: str = "PNG", **options: Any) -> EncodedPicture:
    return EncodedPicture(
        (encoded(image, file, **options),), plan_image(image.width, image.height, media, GRID), f"a {file}"
    )


def expected_rows(pictures: list[EncodedPicture]) -> Tensor:
    """By the reference of the contract."""
    rows = []
    for files, plan, where in pictures:
        frames = [decode_image(file, where) for file in files]
        rows.append(tile_pixels(plan, np.stack(frames) if plan.kind == "video" else frames[0]))
    return torch.cat(rows)


def good_pictures() -> list[EncodedPicture]:
    turned = encoded(noise(40, 90), "JPEG", exif=turned_exif(6))
    frames = tuple(encoded(noise(60, 50, seed=seed), "JPEG") for seed in range(3))
    return [
        picture(noise(300, 41)),
        picture(noise(77, 130, "CMYK"), file="JPEG"),
        picture(noise(130, 77), "one_of_several", file="WEBP"),
        EncodedPicture((turned,), plan_image(90, 40, "image", GRID)),
        EncodedPicture(frames, plan_image(60, 50, "video", GRID, frames=3)),
        picture(noise(20, 30, "I;16")),
        picture(noise(50, 30).quantize(20), file="GIF"),
    ]


def test_tiles_equal_the_contracts_reference() -> None:
    pictures = good_pictures()
    with open_decoder(TILED, GRID, EXACT) as decoder:
        found = decoder.decode_rows(pictures)
        assert found.ok == [True] * len(pictures) and found.problems == (None,) * len(pictures)
        assert torch.equal(found.patches, expected_rows(pictures))
        assert decoder.decode_rows([]).patches.shape == (0, 588)
    with open_decoder(TILED, GRID, EXACT, dtype=torch.bfloat16) as decoder:
        assert torch.equal(decoder.decode_rows(pictures).patches, expected_rows(pictures).bfloat16())


@pytest.mark.parametrize("config", [EXACT, PIL], ids=["exact", "pil"])
@pytest.mark.parametrize(
    ("mode", "file"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG")]
)
def test_squares_equal_infimms_processor(mode: str, file: str, config: DecodeConfig) -> None:
    sizes = [(100, 70), (57, 200), (20, 30), (56, 56)]
    pictures, expected = [], []
    for width, height in sizes:
        content = encoded(noise(width, height, mode), file)
        kind: MediaKind = "one_of_several" if width == 57 else "image"  # makes no difference here
        pictures.append(EncodedPicture((content,), plan_image(width, height, kind, SQUARE)))
        expected.append(clip_pixels(Image.open(io.BytesIO(content)), 56))
    with open_decoder(CLIP, SQUARE, config) as decoder:
        found = decoder.decode_rows(pictures).patches
    right = patch_rows(torch.stack(expected), 14)
    if config == EXACT or mode not in ("RGB", "L"):
        torch.testing.assert_close(found, right, atol=1e-6, rtol=0)
    else:
        torch.testing.assert_close(found, right, atol=2.01 / 255 / min(CLIP.std), rtol=0)


@pytest.mark.parametrize("is_black_or_white", [False, True])
def test_the_quick_resize_is_pils_but_for_rounding(is_black_or_white: bool) -> None:
    """Sharp edges show an order of rows and columns that differs: there PIL is off by up to 30."""
    draw = np.random.default_rng(5)
    differences = []
    for _ in range(150):
        width, height, new_width, new_height = (int(side) for side in np.exp(draw.uniform(0, np.log(400), 4)))
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if is_black_or_white:
            pixels = np.where(pixels < 128, np.uint8(0), np.uint8(255))
        found = resize_quick(pixels, new_width, new_height)
        assert found.shape == (new_height, new_width, 3) and found.flags.c_contiguous
        expected = resize_bicubic(pixels, new_width, new_height)
        differences.append(np.abs(found.astype(int) - expected).ravel())
    each = np.concatenate(differences)
    assert each.max() <= 2 and each.mean() < 0.02 and np.mean(each > 1) < 1e-3


FRAMES = tuple(encoded(noise(60, 50, seed=seed), "PNG") for seed in range(3))
BAD = {
    "cut": (picture(noise(300, 41))._replace(files=(encoded(noise(300, 41), "JPEG")[:-900],)), "truncated"),
    "empty": (picture(noise(30, 41))._replace(files=(b"",)), "no picture that can be read"),
    "text": (picture(noise(30, 41))._replace(files=(b"hello",)), "no picture that can be read"),
    "huge": (EncodedPicture((huge_png(),), plan_image(13_000, 13_000, "image", GRID)), "more than 80000000 pixels"),
    "other": (
        picture(noise(30, 41))._replace(files=(encoded(noise(41, 30), "PNG"),)),
        "'41x30': its index says 30x41",
    ),
    "frames": (
        EncodedPicture(FRAMES[:2], plan_image(60, 50, "video", GRID, frames=3), "sample 7"),
        "sample 7 = '2 files': its index says 3",
    ),
    "frame": (
        EncodedPicture((*FRAMES[:2], FRAMES[2][:300]), plan_image(60, 50, "video", GRID, frames=3), "sample 7"),
        "sample 7: frame 2 = '300 bytes': cannot be read",
    ),
    "two": (picture(noise(30, 41))._replace(files=FRAMES[:2]), "its index says 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_stays_with_its_picture(name: str) -> None:
    good, (bad, problem) = good_pictures()[:3], BAD[name]
    with open_decoder(TILED, GRID, EXACT) as decoder:
        found = decoder.decode_rows([good[0], bad, *good[1:]])
    assert found.ok == [True, False, True, True]
    assert problem in str(found.problems[1])
    before, blank, behind = found.patches.split(
        [good[0].plan.patch_rows, bad.plan.patch_rows, sum(one.plan.patch_rows for one in good[1:])]
    )
    assert (blank == -1).all(), "black"
    assert torch.equal(torch.cat([before, behind]), expected_rows(good))


def test_a_batch_of_damage_alone_takes_no_memory() -> None:
    bad = EncodedPicture((huge_png(),), plan_image(13_000, 13_000, "one_of_several", GRID))
    with open_decoder(TILED, GRID, PIL) as decoder:
        found = decoder.decode_rows([bad] * 3)
    assert found.ok == [False] * 3 and (found.patches == -1).all() and len(found.patches) == 3 * GRID.tokens_per_tile


def test_limits_are_those_of_the_settings() -> None:
    strict = PIL.replace(limits=ImageLimits(longest_side=29))
    with open_decoder(TILED, GRID, strict) as decoder:
        found = decoder.decode_rows([picture(noise(30, 20)), picture(noise(29, 20))])
    assert found.ok == [False, True] and "longer than 29 pixels" in str(found.problems[0])
    with pytest.raises(ConfigError, match=r"threads.*is below 1"):
        DecodeConfig(threads=0)


def test_batches_are_decoded_ahead_and_come_in_order() -> None:
    batches = [[one] for one in good_pictures()]
    with open_decoder(TILED, GRID, PIL.replace(threads=3)) as decoder:
        handles = [decoder.submit(batch) for batch in batches]
        found = [handle.result().patches for handle in handles]
        assert all(
            torch.equal(one, decoder.decode_rows(batch).patches) for one, batch in zip(found, batches, strict=True)
        )
    assert handles[-1].done()


def test_dali_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert not has_dali()
    with pytest.raises(UnavailableError, match=r"decoder = 'dali': NVIDIA DALI is not installed; pip install nvidia-"):
        open_decoder(TILED, GRID, DecodeConfig(decoder="dali"))
    decoder: Decoder
    with open_decoder(TILED, GRID) as decoder:
        assert isinstance(decoder, PilDecoder)
        pictures = good_pictures()
        close = torch.isclose(decoder.decode_rows(pictures).patches, expected_rows(pictures), atol=4.1 / 255, rtol=0)
        assert close.all()
