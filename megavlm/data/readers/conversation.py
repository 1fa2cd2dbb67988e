"""Turns and pictures of a conversation, in the three spellings in use.

`from`/`value` (LLaVA), `role`/`content` with text or with parts (OpenAI, Hugging Face), `user`/`assistant` pairs
(FineVision, The Cauldron).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from megavlm.data.readers.base import Bad, Context, Record, kind_of, list_of, text_of
from megavlm.data.readers.pictures import image_of, images_of, video_of
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG, Picture, Role, Sample, Turn

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
FIELDS = ("conversations", "messages", "texts", "conversation")
"""Where a record has its turns, the first that is there."""
TEXTS, IMAGES, VIDEOS = (
    ("text", "input_text", "output_text"),
    ("image", "image_url", "input_image"),
    ("video", "videos"),
)


def conversation(record: Record, context: Context) -> Iterator[Sample]:
    """One conversation; its pictures are those of its parts, and those that the record names beside it."""
    turns, inside = _turns(record, context)
    images = images_of(_first(record, "image", "images"), context)
    videos = _videos(_first(record, "video", "videos"), context)
    if videos and not images and not any(VIDEO_TAG in turn.text for turn in turns):
        turns = [Turn(turn.role, turn.text.replace(IMAGE_TAG, VIDEO_TAG)) for turn in turns]  # LLaVA's way of naming
    if inside and (images or videos):
        raise Bad("pictures in two places: in the messages and beside them")
    yield Sample("", tuple(inside or in_order(turns, images, videos)), tuple(turns))


def tagged(record: Record, context: Context) -> Iterator[Sample]:
    """The same, where pictures without any tag stand in front of the first question."""
    for sample in conversation(record, context):
        at = next((index for index, turn in enumerate(sample.turns) if turn.role == "user"), None)
        if at is not None and sample.pictures and not sample.tags:
            front = "".join((VIDEO_TAG if picture.is_video else IMAGE_TAG) + "\n" for picture in sample.pictures)
            first = Turn("user", front + sample.turns[at].text)
            turns = (*sample.turns[:at], first, *sample.turns[at + 1 :])
            sample = Sample("", sample.pictures, turns)
        yield sample


def in_order(turns: list[Turn], images: list[Picture], videos: list[Picture]) -> list[Picture]:
    """Images and videos as their tags follow each other; as they are, where the tags don't fit them."""
    text = "".join(turn.text for turn in turns)
    if not (images and videos) or (text.count(IMAGE_TAG), text.count(VIDEO_TAG)) != (len(images), len(videos)):
        return [*images, *videos]
    places = sorted(
        (place, is_video) for is_video, tag in enumerate((IMAGE_TAG, VIDEO_TAG)) for place in _at(text, tag)
    )
    left = (iter(images), iter(videos))
    return [next(left[is_video]) for _, is_video in places]


def _at(text: str, tag: str) -> Iterator[int]:
    place = text.find(tag)
    while place >= 0:
        yield place
        place = text.find(tag, place + 1)


def _turns(record: Record, context: Context) -> tuple[list[Turn], list[Picture]]:
    """The turns, and the pictures that stand inside them."""
    name = next((field for field in FIELDS if record.get(field) is not None), None)
    if name is None:
        raise Bad(f"no conversation: the record has only {', '.join(map(str, itertools.islice(record, 12)))}")
    turns: list[Turn] = []
    pictures: list[Picture] = []
    for item in list_of(record[name], name):
        if not isinstance(item, dict):
            raise Bad(f"wrong type: a turn is {kind_of(item)}, not an object")
        for role, content in _said(item):
            turns.append(Turn(role, _text(content, pictures, context)))
    # As LLaVA does: the first word is the user's. What an assistant says before it answers nothing.
    while turns and turns[0].role == "assistant" and IMAGE_TAG not in turns[0].text:
        turns.pop(0)
    if not turns:
        raise Bad("no turns: the user says nothing")
    return turns, pictures


def _said(item: dict[str, Any]) -> Iterator[tuple[Role, Any]]:
    if "user" in item and "assistant" in item:
        yield "user", item["user"]
        yield "assistant", item["assistant"]
        return
    name = item.get("from", item.get("role"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Bad(f"unknown role: {name!r}"[:200])
    yield role, item.get("value", item.get("content"))


def _text(content: Any, pictures: list[Picture], context: Context) -> str:
    """What a turn says, a tag for each picture; a list of parts becomes lines."""
    if not isinstance(content, list):
        return text_of(content, "what a turn says")
    return "\n".join(_part(part, pictures, context) for part in content)


def _part(part: Any, pictures: list[Picture], context: Context) -> str:
    if not isinstance(part, dict):
        return text_of(part, "a part of a message")
    kind = part.get("type", "text" if "text" in part else None)
    if kind in TEXTS:
        return text_of(part.get("text"), "the text of a part")
    if kind in IMAGES:
        source = _first(part, "image_url", "image", "url", "path")
        if isinstance(source, dict) and "url" in source:
            source = source["url"]
        if source is not None:  # else its picture stands beside the messages
            pictures.append(image_of(source, context))
        return IMAGE_TAG
    if kind in VIDEOS:
        source = _first(part, "video", "frames", "path")
        if source is not None:
            pictures.append(video_of(source, context))
        return VIDEO_TAG
    raise Bad(f"unknown part of a message: {kind!r}"[:200])


def _videos(value: Any, context: Context) -> list[Picture]:
    """One video (a folder, or a list of frames), or a list of folders or of lists."""
    if value is None or value == "" or value == []:
        return []
    if not isinstance(value, list):
        return [video_of(value, context)]
    is_frames = all(isinstance(item, str) and "." in item.rpartition("/")[2] for item in value)
    return [video_of(value, context)] if is_frames else [video_of(item, context) for item in value]


def _first(record: Any, *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)
