"""A sample as data sets hold it, whatever its format: a conversation or a document, and its pictures undecoded.

Readers of foreign formats make samples, the writer of shards stores them, and the reader of shards gives them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"

Role = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    """What one side of a conversation says; a tag stands where a picture or a video belongs."""

    role: Role
    text: str


@dataclass(frozen=True)
class Picture:
    """An image, or a video as its frames, in the bytes of their files."""

    files: tuple[bytes, ...]
    """One file; for a video one for each frame."""
    is_video: bool = False


@dataclass(frozen=True)
class Sample:
    """A conversation, or a document: one text with pictures in it, such as a caption behind its picture."""

    id: str
    """Unique within its data set; reports and ledgers name it."""
    pictures: tuple[Picture, ...]
    """In the order of their tags."""
    turns: tuple[Turn, ...] = ()
    """The conversation; none in a document."""
    text: str = ""
    """The document; empty in a conversation."""
    source: str = ""
    """The data set it comes from, by which losses are told apart."""

    @property
    def tags(self) -> int:
        """Places for pictures."""
        texts = (self.text, *(turn.text for turn in self.turns))
        return sum(text.count(IMAGE_TAG) + text.count(VIDEO_TAG) for text in texts)


@dataclass(frozen=True)
class Refusal:
    """Something of a data set that makes no sample."""

    id: str
    reason: str
    """`kind`, or `kind: detail`."""

    @property
    def kind(self) -> str:
        """What refusals are counted by."""
        return self.reason.partition(":")[0]
