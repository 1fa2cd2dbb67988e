"""A sample's words as the JSON member of a shard: how we write them, and what is understood of others' datasets.

Ours: `{"id", "source", "turns": [{"role", "text"}]}` or `{"id", "source", "text"}`; where a sample holds videos,
`"frames"` has a number for each picture: 0 for an image, otherwise the frames of a video. Also understood are
conversations as `conversations` (`from`, `value`), as `messages` (`role`, `content`), as `texts` (`user`, `assistant`)
or as a bare list of turns, and a `caption`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG, Picture, Role, Sample, Turn

MOST_JSON_BYTES = 16 * 2**20
"""Longer members are refused by their size, before any of it is read."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_PART_TAGS = {"image": IMAGE_TAG, "image_url": IMAGE_TAG, "video": VIDEO_TAG, "video_url": VIDEO_TAG}


@dataclass(frozen=True)
class Words:
    """What a JSON member says: a sample without the bytes of its pictures."""

    id: str
    source: str
    turns: tuple[Turn, ...]
    text: str
    frames: tuple[int, ...] | None
    """For each picture 0, or the frames of a video; None where every file is an image."""

    def with_files(self, files: list[bytes]) -> Sample:
        """The sample with these picture files; ValueError with the reason where they do not fit its words."""
        frames = self.frames if self.frames is not None else (0,) * len(files)
        if sum(max(1, count) for count in frames) != len(files):
            raise ValueError("its frames and its picture files differ in number")
        pictures, rest = [], iter(files)
        for count in frames:
            pictures.append(Picture(tuple(next(rest) for _ in range(max(1, count))), is_video=count > 0))
        sample = Sample(self.id, tuple(pictures), self.turns, self.text, self.source)
        check_words(sample)
        return sample


def check_words(sample: Sample) -> None:
    """ValueError with the reason where a sample contradicts itself."""
    if bool(sample.turns) == bool(sample.text):
        raise ValueError("it is both a conversation and a document" if sample.text else "it holds no text")
    if sample.tags != len(sample.pictures):
        raise ValueError("its tags and its pictures differ in number")
    for picture in sample.pictures:
        if not picture.files or (len(picture.files) > 1 and not picture.is_video):
            raise ValueError("a picture of it has no file" if not picture.files else "an image of it has several files")


def encode_words(sample: Sample) -> bytes:
    """The JSON member of a sample; ValueError where it holds what is no Unicode, or too much."""
    record: dict[str, Any] = {"id": sample.id, "source": sample.source}
    if any(picture.is_video for picture in sample.pictures):
        record["frames"] = [len(picture.files) if picture.is_video else 0 for picture in sample.pictures]
    if sample.turns:
        record["turns"] = [{"role": turn.role, "text": turn.text} for turn in sample.turns]
    else:
        record["text"] = sample.text
    try:
        data = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise ValueError("its text is no Unicode") from None
    if len(data) > MOST_JSON_BYTES:
        raise ValueError("its text is too long")
    return data


def decode_words(data: bytes, name: str) -> Words:
    """What a JSON member says, ours or others'; `name` is the id where it has none. ValueError with the reason."""
    try:
        record = json.loads(data)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("its text is no Unicode") from None
    except (ValueError, RecursionError):
        raise ValueError("its text is no JSON") from None
    if isinstance(record, list):
        record = {"conversations": record}
    if not isinstance(record, dict):
        raise ValueError("its JSON holds no text that is understood")
    turns, text = _turns(record), ""
    if not turns:
        text = next((record[key] for key in ("text", "caption") if isinstance(record.get(key), str)), "")
        if not text:
            raise ValueError("its JSON holds no text that is understood")
    words_id, source = record.get("id"), record.get("source")
    return Words(
        id=str(words_id) if isinstance(words_id, str | int) and words_id != "" else name,
        source=source if isinstance(source, str) else "",
        turns=turns,
        text=text,
        frames=_frames(record.get("frames")),
    )


def _frames(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(count) is int and 0 <= count < 2**31 for count in value):
        raise ValueError("its frames are no list of numbers")
    return tuple(value)


def _turns(record: dict[str, Any]) -> tuple[Turn, ...]:
    for key in ("turns", "conversations", "messages"):
        if isinstance(record.get(key), list):
            return tuple(_turn(turn) for turn in record[key])
    if isinstance(record.get("texts"), list):
        pairs = [pair if isinstance(pair, dict) else {} for pair in record["texts"]]
        sides: tuple[Role, Role] = ("user", "assistant")
        return tuple(Turn(role, _text(pair.get(role))) for pair in pairs for role in sides)
    return ()


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError("a turn of it is no JSON object")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError("a turn of it is of an unknown role")
    return Turn(_ROLES[role], _text(turn.get("text", turn.get("value", turn.get("content")))))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("a turn of it holds no text")
    return "".join(_part(part) for part in value)


def _part(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _PART_TAGS:
        raise ValueError("a turn of it holds a part of an unknown type")
    return _PART_TAGS[kind]
