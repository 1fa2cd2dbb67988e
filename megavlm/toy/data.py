"""The toy world as prepared data sets, with the token counts that the toy recipes ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megavlm.data.chat import ChatConfig
from megavlm.data.formats import Words
from megavlm.data.sample import Sample
from megavlm.data.shards import write_shards
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import PictureKind, SampleKind, ToyWorld
from megavlm.log import get_logger

logger = get_logger(__name__)

KINDS: tuple[PictureKind, ...] = (
    *("colour", "shape", "shape", "position", "relation", "count"),
    *("count_by", "count_by", "count_by"),
    *("reading", "reading", "character"),
)
"""What pictures are drawn for: counting by colour or form is the hardest to learn, and comes often."""
SAMPLES: dict[SampleKind, int] = {
    "pairs": 5000,
    "documents": 1250,
    "chat": 8000,
    "multi_image": 450,
    "text": 450,
}
"""Samples of each data set: little more than a stage of infimm-tiny takes."""
TEMPLATES: dict[str, tuple[ChatConfig, ...]] = {
    "infimm": (ChatConfig(template="plain"), ChatConfig(template="vicuna")),
    "aquila-vl": (ChatConfig(template="chatml"), ChatConfig(template="chatml")),
}
"""Formats of each family's stages: captions first, then conversations."""


def toy_world(seed: int) -> ToyWorld:
    """The pictures of a run with this seed."""
    return ToyWorld(seed=seed, kinds=KINDS, questions=10)


def prepare_toy_data(
    folder: Path,
    tokenizer: Path,
    seed: int = 0,
    *,
    family: str = "infimm",
    samples: Mapping[SampleKind, int] = SAMPLES,
    workers: int = 0,
) -> None:
    """The data sets toy-pairs, toy-documents, toy-chat, toy-multi_image and toy-text, counted for a family's stages.

    A data set that is there already is left as it is; small ones are made before worker processes would be up.
    """
    read = Tokenizer(tokenizer)
    for kind, count in samples.items():
        out = folder / f"toy-{kind}"
        chunks = [_Chunk(kind, first, min(1000, count - first), toy_world(seed)) for first in range(0, count, 1000)]
        report = write_shards(
            chunks, out, plan={"seed": seed, "samples": count}, workers=workers if count > 3000 else 0
        )
        captions, conversations = TEMPLATES[family]
        words = Words(read, captions if kind in ("pairs", "documents") else conversations)
        counted = add_token_counts(out, words.count, words.name, words.hash)
        logger.info("%s: %d samples, %d tokens of text", out.name, report.samples, counted.tokens)


@dataclass(frozen=True)
class _Chunk:
    """Some of a data set's samples."""

    kind: SampleKind
    first: int
    count: int
    world: ToyWorld

    def __iter__(self) -> Iterator[Sample]:
        return toy_samples(self.kind, "train", self.first, self.count, self.world)
