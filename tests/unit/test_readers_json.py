"""LLaVA's and OpenAI's conversations: what a good record becomes, and why a bad one is refused."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from foreign_data import llava_record, picture, read_all, write_json, write_lines, write_pictures

from megavlm.data.sample import Picture, Turn


def test_llava_takes_none_one_and_several_images(tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "images", ["a.png", "sub/b.png"])
    records = [llava_record("x"), llava_record("y", "a.png"), llava_record("z", ["sub/b.png", "a.png"])]
    path = write_json(tmp_path / "set.json", records)
    samples, refusals = read_all(path, "llava", images=str(tmp_path / "images"))
    assert refusals == []
    assert [sample.id for sample in samples] == ["x@set.json:0", "y@set.json:1", "z@set.json:2"]
    assert [sample.source for sample in samples] == ["set"] * 3
    assert samples[0].pictures == ()
    assert samples[1].pictures == (Picture((files["a.png"],)),)
    assert samples[2].pictures == (Picture((files["sub/b.png"],)), Picture((files["a.png"],)))
    assert samples[2].turns == (Turn("user", "<image>\n<image>\nWhat?"), Turn("assistant", "A thing."))


def test_lines_and_an_array_give_the_same(tmp_path: Path) -> None:
    records = [llava_record(str(number), question="Ü " * number + "?") for number in range(5)]
    expected = read_all(write_json(tmp_path / "set.json", records), "llava")[0]
    assert len(expected) == 5
    for name in ("lines.jsonl", "lines.json"):
        found = read_all(write_lines(tmp_path / name, records), "llava")[0]
        assert [sample.turns for sample in found] == [sample.turns for sample in expected]


def test_video_frames_come_from_a_folder_or_a_list_in_their_order(tmp_path: Path) -> None:
    names = [f"clip/frame{number}.png" for number in (1, 2, 10)]
    files = write_pictures(tmp_path, names)
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    frames = Picture(tuple(files[name] for name in names), is_video=True)
    turns = llava_record("x", "")["conversations"]
    question = {"from": "human", "value": "<image> then <video>"}
    records = [
        {"video": "clip", "conversations": turns},
        {"video": names, "conversations": turns},
        {"video": ["clip"], "image": "clip/frame1.png", "conversations": [question, turns[1]]},
    ]
    samples, refusals = read_all(write_json(tmp_path / "set.json", records), "llava")
    assert refusals == []
    assert samples[0].pictures == samples[1].pictures == (frames,)
    assert samples[0].turns[0].text == "<video>\nWhat?"  # LLaVA writes <image> for a video
    assert [picture.is_video for picture in samples[2].pictures] == [False, True]


def test_messages_take_parts_file_names_and_data_urls(tmp_path: Path) -> None:
    files = write_pictures(tmp_path, ["a.png"])
    url = "data:image/png;base64," + base64.b64encode(picture(7)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/a.png"}},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
    ]
    beside = {"messages": llava_record("x", "a.png")["conversations"], "images": ["a.png"]}
    samples, refusals = read_all(write_lines(tmp_path / "chat.jsonl", [{"messages": messages}, beside]), "messages")
    assert refusals == []
    assert samples[0].id == "chat.jsonl:0"
    expected = (Turn("system", "Be brief."), Turn("user", "<image>\nand\n<image>\n<image>"), Turn("assistant", "Two."))
    assert samples[0].turns == expected
    assert [image.files[0] for image in samples[0].pictures] == [files["a.png"], picture(7), files["a.png"]]
    assert samples[1].pictures == (Picture((files["a.png"],)),)


def _talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "../secret.png", "conversations": _talk("<image>", "a")}, "path leaves the folder of pictures"),
        ({"image": "/etc/passwd", "conversations": _talk("<image>", "a")}, "path leaves the folder of pictures"),
        ({"image": "link.png", "conversations": _talk("<image>", "a")}, "path leaves the folder of pictures"),
        ({"video": "..", "conversations": _talk("<video>", "a")}, "path leaves the folder of pictures"),
        ({"image": "none.png", "conversations": _talk("<image>", "a")}, "picture missing"),
        ({"image": "a\0b.png", "conversations": _talk("<image>", "a")}, "picture missing"),
        ({"image": "x" * 5000, "conversations": _talk("<image>", "a")}, "picture unreadable"),
        ({"image": "empty.png", "conversations": _talk("<image>", "a")}, "picture empty"),
        ({"image": "folder", "conversations": _talk("<image>", "a")}, "picture unreadable"),
        ({"image": "pipe", "conversations": _talk("<image>", "a")}, "picture unreadable"),
        ({"image": "text.png", "conversations": _talk("<image>", "a")}, "picture unusable (a picture file is of no"),
        ({"image": "http://a.b/c.png", "conversations": _talk("<image>", "a")}, "picture not local"),
        ({"image": 7, "conversations": _talk("<image>", "a")}, "wrong type: a picture is a number"),
        ({"image": "data:image/png;base64,????", "conversations": _talk("<image>", "a")}, "data URL damaged"),
        ({"image": "data:image/png", "conversations": _talk("<image>", "a")}, "data URL without content"),
        ({"image": ["a.png"] * 9, "conversations": _talk("<image>" * 9, "a")}, "too many pictures: more than 8"),
        ({"image": "a.png", "conversations": _talk("q", "a")}, "tags and pictures disagree: no tags, 1 pictures"),
        (
            {"image": "a.png", "conversations": _talk("<image><image>", "a")},
            "tags and pictures disagree: 2 <image>, 1 pictures",
        ),
        ({"conversations": _talk("<image>", "a")}, "tags and pictures disagree: 1 <image>, 0 pictures"),
        ({"image": "a.png", "conversations": _talk("<video>", "a")}, "tags and pictures disagree: 1 <video>, 1"),
        ({"conversations": _talk("q", "  ")}, "no answer"),
        ({"conversations": _talk("q")}, "no answer"),
        ({"conversations": []}, "no turns"),
        ({"conversations": "q"}, "wrong type: conversations is text"),
        ({"conversations": [7]}, "wrong type: a turn is a number"),
        ({"conversations": [{"from": "human", "value": None}]}, "wrong type: what a turn says is null"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "unknown role: 'robot'"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "turns out of order: user user"),
        ({"conversations": _talk("\ud800", "a")}, "text is not Unicode"),
        ({"conversations": _talk("q" * 3_000_000, "a")}, "text too long"),
        ({"text": "q"}, "no conversation: the record has only text"),
        ([1], "wrong type: the record is a list"),
    ],
)
def test_a_bad_record_is_refused_with_its_reason(tmp_path: Path, record: Any, reason: str) -> None:
    images = tmp_path / "images"
    write_pictures(images, ["a.png"])
    write_pictures(tmp_path, ["secret.png"])
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "empty.png").touch()
    (images / "folder").mkdir()
    (images / "text.png").write_text("no picture")
    os.mkfifo(images / "pipe")
    lines = [record, llava_record("good", "a.png")]
    samples, refusals = read_all(
        write_lines(tmp_path / "set.jsonl", lines), "llava", images=str(images), most_pictures=8
    )
    assert [sample.id for sample in samples] == ["good@set.jsonl:1"]
    assert [refusal.id for refusal in refusals] == ["set.jsonl:0"]
    assert refusals[0].reason.startswith(reason)


def test_links_within_the_folder_and_the_folder_itself_as_a_link_are_fine(tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "real", ["a.png"])
    (tmp_path / "real" / "b.png").symlink_to("a.png")
    (tmp_path / "images").symlink_to(tmp_path / "real")
    path = write_json(tmp_path / "set.json", [llava_record("x", "b.png")])
    samples, refusals = read_all(path, "llava", images=str(tmp_path / "images"))
    assert refusals == []
    assert samples[0].pictures[0].files == (files["a.png"],)


def test_damaged_lines_do_not_spoil_the_others(tmp_path: Path) -> None:
    good = json.dumps(llava_record("x")).encode()
    lines = [b"\xef\xbb\xbf" + good, b"", b"{not json", b'{"id": "\xff"}', b'"text"', b"[" * 100_000, b" " * 10, good]
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\n".join(lines))
    samples, refusals = read_all(path, "llava")
    assert [sample.id for sample in samples] == ["x@set.jsonl:0", "x@set.jsonl:5"]  # one id, two samples
    assert [refusal.reason.partition(":")[0] for refusal in refusals] == [
        "no JSON",
        "not UTF-8",
        "wrong type",
        "no JSON",
    ]


def test_an_enormous_record_is_refused_unread(tmp_path: Path) -> None:
    large = llava_record("large", question="q" * (1 << 20))
    records = [llava_record("a"), large, llava_record("b")]
    for path in (write_lines(tmp_path / "set.jsonl", records), write_json(tmp_path / "set.json", records)):
        samples, refusals = read_all(path, "llava", most_record_mib=1)
        assert [sample.id for sample in samples] == [f"a@{path.name}:0", f"b@{path.name}:2"]
        assert [(refusal.id, refusal.reason) for refusal in refusals] == [
            (f"{path.name}:1", "record too large: more than 1 MiB")
        ]


def test_pictures_of_one_record_are_limited_together(tmp_path: Path) -> None:
    (tmp_path / "big.bmp").write_bytes(picture(0, "BMP", (512, 400)))  # 0.6 MB
    path = write_json(tmp_path / "set.json", [llava_record("x", ["big.bmp"] * 2)])
    assert read_all(path, "llava", most_pictures_mib=1)[1][0].reason.startswith("pictures too large")
    assert len(read_all(path, "llava", most_pictures_mib=2)[0]) == 1
