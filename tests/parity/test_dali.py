"""DALI's decoder against PIL's: the same bits on a CPU, close ones where its graph resizes, damage included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded, noise, png_chunk, png_of, turned_exif
from PIL import Image, ImageDraw
from torch import Tensor

from megavlm.data.decode import CPU, DecodeConfig, Decoded, Decoder, PilDecoder, open_decoder
from megavlm.data.decode_jobs import CLIP, TILED, EncodedPicture, PixelRule, batch_of
from megavlm.data.images import DEFAULT_LIMITS
from megavlm.tiles import GridConfig, MediaKind, plan_image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install nvidia-dali-cuda130")

from megavlm.data.decode_dali import PIECE_FILES, DaliDecoder, suits_dali

GRID = GridConfig(tile_size=98, max_tiles_per_side=3, cap_tiles=5)
SQUARE = GridConfig(tile_size=56, tiling="single")
RULES = [(TILED, GRID), (CLIP, SQUARE)]
EXACT, PIL = DecodeConfig(decoder="exact"), DecodeConfig(decoder="pil")
GPU = torch.device("cuda")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def scene(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours, some noise, and edges, as in a photograph."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(40, 216, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    values = np.asarray(coarse).astype(int) + draw.integers(-6, 7, (height, width, 1))
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = int(draw.integers(width)), int(draw.integers(height))
        box = (left, top, left + width // 4, top + height // 5)
        pen.ellipse(box, fill=tuple(int(value) for value in draw.integers(256, size=3)))
    if "A" in mode:
        image.putalpha(image.convert("L"))
    return image.convert(mode)


def picture(image: Image.Image, file: str, grid: GridConfig, kind: MediaKind = "image", **how: Any) -> EncodedPicture:
    return EncodedPicture(
        (encoded(image, file, **how),), plan_image(image.width, image.height, kind, grid), f"a {file}"
    )


SUITED: list[tuple[str, str, dict[str, Any]]] = [
    ("RGB", "JPEG", {"quality": 90, "subsampling": 0}),
    ("RGB", "JPEG", {"quality": 90, "subsampling": 1}),
    ("RGB", "JPEG", {"quality": 60, "subsampling": 2}),
    ("RGB", "JPEG", {"progressive": True}),
    ("RGB", "JPEG", {"keep_rgb": True}),
    ("L", "JPEG", {}),
    ("RGB", "PNG", {}),
    ("L", "PNG", {}),
    ("RGB", "WEBP", {"quality": 80}),
    ("RGB", "WEBP", {"lossless": True}),
]
FOR_PIL: list[tuple[str, str, dict[str, Any]]] = [
    ("CMYK", "JPEG", {}),
    ("RGB", "JPEG", {"exif": turned_exif(3)}),
    ("RGB", "PNG", {"exif": turned_exif(3)}),
    ("P", "PNG", {}),
    ("1", "PNG", {}),
    ("RGBA", "PNG", {}),
    ("LA", "PNG", {}),
    ("I;16", "PNG", {}),
    ("L", "PNG", {"transparency": 7}),
    ("RGB", "PNG", {"save_all": True, "append_images": [scene(201, 150, 9)]}),
    ("RGBA", "WEBP", {}),
    ("RGB", "WEBP", {"exif": turned_exif(1)}),
    ("RGB", "WEBP", {"save_all": True, "append_images": [scene(201, 150, 9)]}),
    ("RGB", "GIF", {}),
    ("RGB", "TIFF", {}),
    ("RGB", "BMP", {}),
]


def is_suited(one: EncodedPicture) -> bool:
    return suits_dali(DEFAULT_LIMITS, batch_of([one], TILED).jobs[0])


@pytest.mark.parametrize(("rule", "grid"), RULES, ids=["tiled", "clip"])
def test_same_bits_as_pil_whatever_the_format(rule: PixelRule, grid: GridConfig) -> None:
    pictures = []
    for (mode, file, how), expected in [*((one, True) for one in SUITED), *((one, False) for one in FOR_PIL)]:
        one = picture(scene(201, 150, mode=mode), file, grid, **how)
        assert is_suited(one) == expected, (mode, file, how)
        pictures.append(one)
    sixteen = png_of(2, 1, bytes(13), depth=16, colour=2)
    turn = png_chunk(b"eXIf", turned_exif(6).removeprefix(b"Exif\0\0"))
    turned = png_of(1, 2, bytes([0, 10, 0, 200]), behind=turn)
    pictures += [EncodedPicture((content,), plan_image(2, 1, "image", grid)) for content in (sixteen, turned)]
    cut = picture(scene(90, 80), "JPEG", grid)
    for one in (*pictures[-2:], cut._replace(files=(cut.files[0][:-9],)), cut._replace(files=(b"",))):
        assert not is_suited(one)
    with DaliDecoder(rule, grid) as dali, open_decoder(rule, grid, PIL) as pil:
        found, expected_rows = dali.decode_rows(pictures), pil.decode_rows(pictures)
    assert all(found.ok) and torch.equal(found.patches, expected_rows.patches)


def test_all_kinds_of_media_in_many_pieces() -> None:
    draw = np.random.default_rng(1)
    kinds: list[MediaKind] = ["image", "one_of_several"]
    pictures = []
    for number in range(2 * PIECE_FILES + 5):
        width, height = (int(side) for side in draw.integers(1, 150, 2))
        pictures.append(picture(noise(width, height, seed=number), "JPEG", GRID, kinds[number % 2]))
    frames = tuple(encoded(scene(60, 50, seed), "JPEG") for seed in range(4))
    pictures.append(EncodedPicture(frames, plan_image(60, 50, "video", GRID, frames=4)))
    with DaliDecoder(TILED, GRID) as dali, open_decoder(TILED, GRID, PIL) as pil:
        handles = [dali.submit(pictures), dali.submit(pictures[:3]), dali.submit([])]
        found = [handle.result() for handle in handles]
        expected = pil.decode_rows(pictures).patches
    assert torch.equal(found[0].patches, expected)
    assert torch.equal(found[1].patches, expected[: len(found[1].patches)]) and found[2].patches.shape == (0, 588)


def values_apart(found: Tensor, expected: Tensor, rule: PixelRule) -> Tensor:
    """By how many of 255 each value differs."""
    values = found.shape[1] // 3
    std = torch.tensor(rule.std).repeat_interleave(values)
    return (found.cpu() - expected).abs() * std * 255


@pytest.mark.parametrize(("resizes", "device"), [(False, CPU), (True, CPU), pytest.param(True, GPU, marks=NEEDS_GPU)])
@pytest.mark.parametrize(("rule", "grid"), RULES, ids=["tiled", "clip"])
def test_close_to_public_processors(rule: PixelRule, grid: GridConfig, resizes: bool, device: torch.device) -> None:
    draw = np.random.default_rng(2)
    pictures = []
    for number in range(30):
        width, height = (int(side) for side in np.exp(draw.uniform(np.log(20), np.log(600), 2)))
        mode, file, how = SUITED[number % len(SUITED)]
        kind: MediaKind = "one_of_several" if number % 7 == 3 else "image"
        pictures.append(picture(scene(width, height, number, mode), file, grid, kind, **how))
    with DaliDecoder(rule, grid, device=device, resizes=resizes) as dali, open_decoder(rule, grid, EXACT) as exact:
        found, expected = dali.decode_rows(pictures), exact.decode_rows(pictures)
    assert all(found.ok) and all(is_suited(one) for one in pictures)
    apart = values_apart(found.patches, expected.patches, rule)
    assert apart.mean() < 0.3 and (apart < 1.01).double().mean() > 0.998
    if not resizes:
        assert apart.max() < 2.01 and apart.mean() < 0.02


def damaged(kind: str) -> list[EncodedPicture]:
    """Cut, and with bytes overwritten in the middle, where no header tells."""
    draw = np.random.default_rng(3)
    image = scene(150, 110)
    sound = encoded(image, kind)
    plan = plan_image(image.width, image.height, "image", GRID)
    contents = [sound[: len(sound) * percent // 100] for percent in (1, 30, 60, 99)]
    for _ in range(8):
        content = bytearray(sound)
        content[int(draw.integers(len(sound) // 3, len(sound) - 20))] ^= 1 << int(draw.integers(8))
        contents.append(bytes(content))
    return [EncodedPicture((content,), plan, f"damaged {number}") for number, content in enumerate(contents)]


def told(found: Decoded) -> list[str]:
    return [str(problem) for problem in found.problems]


@pytest.mark.parametrize("resizes", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damage_is_found_as_pil_finds_it_and_leaves_the_rest_alone(kind: str, resizes: bool) -> None:
    good = [picture(scene(120, 90, seed), "JPEG", GRID) for seed in range(3)]
    with DaliDecoder(TILED, GRID, resizes=resizes) as dali, PilDecoder(TILED, GRID) as pil:
        sound = dali.decode_rows(good).patches
        outcomes = []
        for bad in damaged(kind):
            found, expected = dali.decode_rows([*good, bad]), pil.decode_rows([*good, bad])
            assert told(found) == told(expected)
            assert resizes or torch.equal(found.patches, expected.patches)
            outcomes.append(found.ok[-1])
            assert torch.equal(dali.decode_rows(good).patches, sound)
        assert not all(outcomes[:4]) and (kind == "PNG" or any(outcomes))


def test_a_refusal_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    content = bytearray(encoded(scene(150, 110), "PNG"))
    content[len(content) // 2] ^= 4
    bad = EncodedPicture((bytes(content),), plan_image(150, 110, "image", GRID), "sample 5")
    assert is_suited(bad)
    with DaliDecoder(TILED, GRID) as dali, caplog.at_level("WARNING", "megavlm"):
        found = [dali.decode_rows([bad]) for _ in range(3)]
    assert [one.ok for one in found] == [[False]] * 3 and "sample 5" in str(found[0].problems[0])
    (message,) = caplog.messages
    assert message.startswith("DALI refused 1 files, which PIL decodes: Failed to decode sample #0")


def memory() -> int:
    """MiB that this process holds."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024


def test_batches_of_all_sizes_leak_nothing() -> None:
    draw = np.random.default_rng(4)
    sizes = draw.integers(20, 400, (24, 2)).tolist()
    files = [picture(scene(width, height), "JPEG", GRID) for width, height in sizes]
    bad = damaged("PNG")[-1]
    decoder: Decoder
    with DaliDecoder(TILED, GRID) as decoder:
        for step in range(150):
            count = int(draw.integers(1, 8))
            chosen = [files[int(number)] for number in draw.integers(0, len(files), count)]
            decoder.decode_rows([*chosen, bad] if step % 10 == 0 else chosen)
            if step == 50:
                before = memory()
        assert memory() - before < 48
