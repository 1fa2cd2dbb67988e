"""Videos to frames: which are taken, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, huge_png, noise, turned_exif

from megavlm.data.images import ImageLimits
from megavlm.data.tile_images import tile_pixels
from megavlm.data.video import FrameSampling, decode_video, sample_frames, video_info
from megavlm.errors import ConfigError, DataError, UnavailableError
from megavlm.tiles import GridConfig, plan_image

FRAMES = [noise(24, 16, seed=seed) for seed in range(12)]
PIXELS = np.stack([np.asarray(frame) for frame in FRAMES])


@pytest.mark.parametrize(
    ("frames", "rate", "taken"),
    [
        (1, 30, [0]),
        (5, 1, [0, 1, 2, 3, 4]),
        (100, 30, [0, 30, 60, 90]),
        (70, 29.97, [0, 30, 60]),
        (7, 2.5, [0, 2, 4, 6]),  # a half is rounded to the even number
        (3, 0.2, [0, 1, 2]),  # slower than what is asked for: all
    ],
)
def test_one_frame_a_second(frames: int, rate: float, taken: list[int]) -> None:
    assert sample_frames(frames, rate) == taken


def test_longer_videos_are_taken_evenly() -> None:
    assert sample_frames(32 * 30, 30) == list(range(0, 960, 30))
    found = sample_frames(32 * 30 + 1, 30)
    assert found == [place * 960 // 31 for place in range(32)]
    assert sample_frames(10, 1, FrameSampling(frames_upbound=4)) == [0, 3, 6, 9]
    assert sample_frames(9, 1, FrameSampling(frames_upbound=1)) == [0]
    assert sample_frames(60, 30, FrameSampling(frames_per_second=2)) == [0, 15, 30, 45]


def test_a_sampling_that_takes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="frames_upbound"):
        FrameSampling(frames_upbound=0)
    with pytest.raises(ConfigError, match="frames_per_second"):
        FrameSampling(frames_per_second=0.0)


def test_a_folder_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number, frame in enumerate(FRAMES):
        (tmp_path / f"clip2_{number + 1}.png").write_bytes(encoded(frame, "PNG"))
    (tmp_path / ".hidden").write_text("no frame")
    assert video_info(tmp_path, "clip") == (24, 16, list(range(12)))
    assert np.array_equal(decode_video(tmp_path, "clip"), PIXELS)
    assert np.array_equal(decode_video(tmp_path, "clip", frames_per_second=5), PIXELS[::5])


def test_a_list_keeps_its_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(encoded(FRAMES[3], "PNG"))
    source: list[bytes | Path] = [encoded(FRAMES[7], "PNG"), tmp_path / "a"]
    assert np.array_equal(decode_video(source, "clip"), PIXELS[[7, 3]])
    found = decode_video([encoded(frame, "PNG") for frame in FRAMES], "clip", None, FrameSampling(frames_upbound=3))
    assert np.array_equal(found, PIXELS[[0, 5, 11]])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_tells_its_own_rate(kind: str, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    still = [encoded(frame.quantize(64) if kind == "GIF" else frame, "PNG") for frame in FRAMES]
    expected = decode_video(still, "frames")
    images = [frame.quantize(64) if kind == "GIF" else frame for frame in FRAMES]
    content = encoded(images[0], kind, save_all=True, append_images=images[1:], duration=250, **options)
    path = tmp_path / "animated"
    path.write_bytes(content)
    for source in (content, path):
        assert video_info(source, "clip") == (24, 16, [0, 4, 8])
        assert np.array_equal(decode_video(source, "clip"), expected[[0, 4, 8]])
    assert np.array_equal(decode_video(content, "clip", frames_per_second=1), expected)


def test_an_animation_that_names_no_delay_has_ten_frames_a_second() -> None:
    content = encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])
    assert video_info(content, "clip").frames == [0, 10]


def test_a_still_picture_is_a_video_of_one_frame() -> None:
    content = encoded(FRAMES[0], "PNG", exif=turned_exif(6))
    assert video_info(content, "clip") == (16, 24, [0])
    assert np.array_equal(decode_video(content, "clip"), np.rot90(PIXELS[:1], -1, (1, 2)))


def test_every_frame_of_an_animation_is_turned() -> None:
    options = {"save_all": True, "append_images": FRAMES[1:3], "duration": 1000, "lossless": True}
    found = decode_video(encoded(FRAMES[0], "WEBP", exif=turned_exif(6), **options), "clip")
    assert np.array_equal(found, np.rot90(PIXELS[:3], -1, (1, 2)))


def test_frames_go_through_the_tiles() -> None:
    grid = GridConfig(tile_size=28)
    pixels = decode_video([encoded(frame, "PNG") for frame in FRAMES[:3]], "clip")
    assert tile_pixels(plan_image(24, 16, "video", grid, frames=3), pixels).shape == (3 * 4, 588)


@pytest.mark.parametrize(
    "head",
    [b"\0\0\0\x20ftypisom", b"\0\0\0\x14ftypqt  ", b"\x1aE\xdf\xa3\x01", b"RIFF\0\0\0\0AVI LIST", b"FLV\1", b"OggS"],
)
def test_films_are_refused_with_what_to_do(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "film"
    path.write_bytes(head + bytes(100))
    for source in (path, path.read_bytes()):
        with pytest.raises(UnavailableError, match=r"^sample 3 = .*no decoder.*ffmpeg -i FILM -vf fps=1"):
            video_info(source, "sample 3")


def test_other_sources_that_are_refused(tmp_path: Path) -> None:
    small = ImageLimits(most_frames=3)
    animated = encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])
    frames = [encoded(frame, "PNG") for frame in FRAMES]
    with pytest.raises(DataError, match=r"clip = .*has 0 frames"):
        decode_video(tmp_path, "clip")
    with pytest.raises(DataError, match=r"has 12 frames, more than 3; cut it"):
        video_info(animated, "clip", limits=small)
    with pytest.raises(DataError, match=r"clip = '12 frames': has 12 frames, not between 1 and 3"):
        video_info(frames, "clip", limits=small)
    with pytest.raises(DataError, match=r"takes 12 frames of 24x16, more than 4000 pixels"):
        video_info(frames, "clip", limits=ImageLimits(most_video_pixels=4000))
    with pytest.raises(DataError, match=r"clip: frame 1 = .*is 30x16 where others are 24x16"):
        decode_video([frames[0], encoded(noise(30, 16), "PNG")], "clip")
    with pytest.raises(DataError, match=r"clip: frame 1 = .*is no picture"):
        decode_video([frames[0], b"text"], "clip")
    with pytest.raises(DataError, match=r"clip: frame 0 = .*more than 80000000 pixels"):
        video_info([huge_png()], "clip")
    with pytest.raises(DataError, match=r"clip = .*no such file"):
        video_info(tmp_path / "none", "clip")
    with pytest.raises(DataError, match=r"clip = .*cannot be read"):
        decode_video(animated[:4000], "clip", 1.0)
