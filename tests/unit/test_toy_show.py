"""What a quickstart prints and draws."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from megavlm.data.toy_world.questions import Question
from megavlm.data.toy_world.world import PictureKind
from megavlm.toy.quiz import Asked, Score
from megavlm.toy.show import curve, losses_in, picture_sheet, score_table, some_of_each


def asked(kind: str, number: int, answer: str = "red") -> Asked:
    question = Question(kind, "colour of shape", f"What colour is the star {number}?", "red")  # type: ignore[arg-type]
    return Asked(question, Image.new("RGB", (64, 64), (number, 0, 0)), answer)


def test_losses_are_read_from_the_log_of_a_run(tmp_path: Path) -> None:
    log = tmp_path / "loss.jsonl"
    entries = [
        {"kind": "start", "iteration": 0},
        {"kind": "step", "iteration": 10, "losses": {"lm loss": 12.5, "lm loss/toy-pairs": 1.0}},
        {"kind": "step", "iteration": 20, "losses": {"lm loss": None}},
        {"kind": "save", "iteration": 20, "blocked_ms": 3.0},
        {"kind": "step", "iteration": 30, "losses": {"lm loss": 0.00314}},
    ]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert losses_in(log) == [(10, 12.5), (30, 0.00314)]


def test_the_table_has_a_line_for_each_kind_and_their_mean() -> None:
    scores: dict[PictureKind, Score] = {
        "colour": Score(chance=0.2, without=0.1, shuffled=0.15, unseen_pictures=1.0, unseen_combinations=0.8),
        "count": Score(chance=0.4, without=0.3, shuffled=0.25, unseen_pictures=0.6, unseen_combinations=0.4),
    }
    head, *lines = score_table(scores).splitlines()
    assert head.split()[-1] == "chance"
    assert [line.split() for line in lines] == [
        ["colour", "90", "100", "80", "15", "10", "20"],
        ["count", "50", "60", "40", "25", "30", "40"],
        ["mean", "70", "80", "60", "20", "20", "30"],
    ]


def test_the_curve_goes_down_from_left_to_right_stage_by_stage() -> None:
    falling = [(step, 4.0 / step) for step in range(1, 41)]
    title, *rows, names = curve({"pretrain": falling, "finetune": [(1, 0.1)]}, width=40, height=8).splitlines()
    assert title == "lm loss"
    assert names.split() == ["pretrain", "finetune"]
    drawn = [[x for x, sign in enumerate(row[7:]) if sign != "\u2800"] for row in rows]
    assert drawn[0] == [0]
    assert min(drawn[-1]) > max(drawn[0])
    assert max(drawn[-1]) >= 20  # the second stage begins in the middle
    assert curve({}) == "no losses"


def test_some_of_each_kind_are_chosen_whatever_was_answered() -> None:
    found = [asked("colour", 0), asked("colour", 1), asked("count", 2), asked("count", 3, "blue"), asked("colour", 4)]
    assert [one.picture.getpixel((0, 0))[0] for one in some_of_each(found, 3)] == [0, 2, 1]


def test_the_sheet_shows_every_picture_and_tells_right_from_wrong(tmp_path: Path) -> None:
    picture_sheet([asked("colour", 250), asked("colour", 240, "blue")], tmp_path / "sheet.png", columns=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    assert {(250, 0, 0), (240, 0, 0)} <= colours
    assert {(0, 100, 0), (178, 34, 34)} <= colours  # dark green and brick red
