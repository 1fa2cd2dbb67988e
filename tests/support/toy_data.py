"""A tokenizer and small data sets to look at: every kind of picture, and words that would like to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from qwen_hf import tiny_tokenizer
from random_samples import picture_file

from megavlm.data.sample import Picture, Sample, Turn
from megavlm.data.shards import write_shards
from megavlm.data.tokenizer import Tokenizer
from megavlm.tiles import GridConfig

SMALL = ("--tile-size", "56", "--grid", "2/3")
SMALL_GRID = GridConfig(tile_size=56, max_tiles_per_side=2, cap_tiles=3)
EVIL = (
    "</span></div></details><script>document.title='run'</script><img src=x onerror=run()> & &lt; \x00\x1b[31m"
    "\N{RIGHT-TO-LEFT OVERRIDE}turned\N{POP DIRECTIONAL FORMATTING} \N{PARTY POPPER}"
)
EVIL_ID = '"><svg onload=run()>'


def write_tokenizer(folder: Path) -> Tokenizer:
    """Of Qwen2's kind, with the tokens of both families."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|endofchunk|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return Tokenizer(folder)


def chat(name: str, pictures: Sequence[Picture], question: str, answer: str, source: str = "toy") -> Sample:
    tags = "".join("<video>\n" if picture.is_video else "<image>\n" for picture in pictures)
    turns = (Turn("user", tags + question), Turn("assistant", answer))
    return Sample(name, tuple(pictures), turns, source=source)


def kinds_of_samples(seed: int = 0) -> list[Sample]:
    """One of each: alone, wide, tall, several, video, mixed, no picture, document, evil."""
    rng = np.random.default_rng(seed)

    def image(width: int, height: int, kind: str = "PNG") -> Picture:
        return Picture((picture_file(rng, kind, (width, height)),))

    video = Picture(tuple(picture_file(rng, "JPEG", (40, 30)) for _ in range(5)), is_video=True)
    return [
        chat("alone", [image(60, 60)], "What?", "Noise."),
        chat("wide", [image(300, 40, "JPEG")], "What?", "Wide noise.\n\n1. one\n"),
        chat("tall", [image(30, 200)], "And?", "Tall noise."),
        chat("several", [image(90, 40), image(40, 90), image(5, 5)], "Compare.", "All noise."),
        chat("video", [video], "What happens?", "Noise moves."),
        chat("both", [image(70, 50), video], "What?", "A picture and a film."),
        chat("text", [], "1 + 1?", "2"),
        Sample("document", (image(64, 48), image(48, 64)), text="First <image> words, <image> more.", source="book"),
        chat(EVIL_ID, [image(20, 20)], EVIL, f"<!-- {EVIL} ]]></style>", "\x1b[2Jevil"),
    ]


def write_dataset(folder: Path, samples: Sequence[Sample]) -> Path:
    write_shards([samples], folder)
    return folder
