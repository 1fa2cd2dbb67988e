"""Questions, answers and captions in json, with the prompts of InfiMM's multi-task stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign_data import read_all, write_json, write_pictures

ONE_WORD = "Answer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("dataset", "record", "prompt", "answer"),
    [
        ("VQAv2", {"question": "Who?", "answers": ["b", "a", "a"]}, f"Who?\n{ONE_WORD}", "a"),
        ("OKVQA", {"question": "Who?", "answers": [{"answer": "b"}, {"answer": "a"}]}, f"Who?\n{ONE_WORD}", "b"),
        ("GQA", {"question": " Who? ", "answer": "yes"}, f"Who?\n{ONE_WORD}", "yes"),
        ("set", {"question": "How many?", "answer": 3}, f"How many?\n{ONE_WORD}", "3"),
        (
            "VizWiz VQA",
            {"question": "Who?", "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}]},
            f"Who?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{ONE_WORD}",
            "Unanswerable",
        ),
        (
            "ScienceQA-image",
            {"question": "Who?", "choices": ["Ann", "Bob"], "answer": 1},
            "Who?\nA. Ann\nB. Bob\nAnswer with the option's letter from the given choices directly.",
            "B",
        ),
        ("scienceqa", {"question": "Who?", "options": ["Ann", "Bob"], "answer": "Bob"}, None, "B"),
        (
            "A-OKVQA",
            {"question": "Who?", "choices": ["Ann", "Bob"], "correct_choice_idx": 0, "direct_answers": ["ann"]},
            f"Who?\n{ONE_WORD}",
            "ann",
        ),
        ("COCO Caption", {"caption": " A dog. "}, "Please describe the image.", "A dog."),
        ("TextCaps", {"captions": ["A dog.", "A cat."]}, "Please describe the image.", "A dog."),
    ],
)
def test_prompts_by_the_name_of_the_data_set(
    tmp_path: Path, dataset: str, record: dict[str, Any], prompt: str | None, answer: str
) -> None:
    write_pictures(tmp_path, ["a.png"])
    path = write_json(tmp_path / "x.json", [{"image": "a.png", **record}])
    samples, refusals = read_all(path, "vqa", dataset=dataset)
    assert refusals == []
    assert samples[0].source == dataset
    assert prompt is None or samples[0].turns[0].text == f"<image>\n{prompt}"
    assert samples[0].turns[1].text == answer


def test_the_name_of_the_file_stands_for_the_data_set(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.png"])
    path = write_json(tmp_path / "vizwiz_train.json", [{"image": "a.png", "question": "Who?", "answer": "Ann"}])
    assert "Unanswerable" in read_all(path, "vqa")[0][0].turns[0].text


def test_files_that_name_records_by_key_or_list_questions(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.png", "7.jpg"])
    by_key = {"007": {"imageId": 7, "question": "Who?", "answer": "Ann"}}
    sample = read_all(write_json(tmp_path / "gqa.json", by_key), "vqa")[0][0]
    assert sample.id == "007@gqa.json:0"
    listed = {"data": [{"image": "a.png", "questions": ["1?", "2?"], "answers": ["one", "two"]}]}
    sample = read_all(write_json(tmp_path / "ocrvqa.json", listed), "vqa")[0][0]
    assert [turn.text for turn in sample.turns] == [
        f"<image>\n1?\n{ONE_WORD}", "one", f"2?\n{ONE_WORD}", "two"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "Who?", "answers": []}, "no answer: the list"),
        ({"question": "Who?"}, "wrong type: an answer is null"),
        ({"question": ["1?"], "answers": []}, "lists differ in length"),
        ({"question": "Who? <image>", "answer": "a"}, "tags and pictures disagree"),
        ({"question": "Who?", "choices": ["a"], "correct_choice_idx": 3}, "no answer: 3 is none of the 1"),
        ({"question": {}, "answer": "a"}, "wrong type: the question is an object"),
        ({"words": 1}, "neither question nor caption"),
        ({"question": "Who?", "answer": "a", "image": None}, "picture missing"),
        ({"question": "Who?", "answer": "a", "image": None, "image_id": [1]}, "wrong type: the name of a picture"),
    ],
)
def test_a_bad_record_is_refused(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    write_pictures(tmp_path, ["a.png"])
    samples, refusals = read_all(write_json(tmp_path / "x.json", [{"image": "a.png", **record}]), "vqa")
    assert samples == []
    assert refusals[0].reason.startswith(reason)


def test_vqav2_has_its_answers_in_another_file_and_numbers_for_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["COCO_train2014_000000000009.jpg", "000000000025.jpg"])
    questions = [
        {"image_id": 9, "question": "Who?", "question_id": 9000},
        {"image_id": 25, "question": "What?", "question_id": 25001},
        {"image_id": 9, "question": "Where?", "question_id": 9001},
        {"image_id": 7, "question": "When?", "question_id": 9000},
    ]
    said = [{"answer": "b", "answer_id": 1}, {"answer": "a", "answer_id": 2}, {"answer": "a", "answer_id": 3}]
    annotations = [
        {"question_id": 25001, "image_id": 25, "answers": [{"answer": "c"}], "multiple_choice_answer": "c"},
        {"question_id": 9000, "image_id": 9, "answers": said},
        {"question_id": 9001, "image_id": 9, "answers": []},
    ]
    path = write_json(tmp_path / "v2_questions.json", {"info": {}, "data_subtype": "train2014", "questions": questions})
    answers = write_json(tmp_path / "v2_annotations.json", {"license": {}, "annotations": annotations})
    samples, refusals = read_all(path, "vqa", dataset="VQAv2", annotations=str(answers))
    assert [(sample.turns[0].text, sample.turns[1].text) for sample in samples] == [
        (f"<image>\nWho?\n{ONE_WORD}", "a"),
        (f"<image>\nWhat?\n{ONE_WORD}", "c"),
    ]
    assert [refusal.reason.partition(":")[0] for refusal in refusals] == ["no answer", "picture missing"]
    without, refusals = read_all(path, "vqa", dataset="VQAv2")
    assert without == [] and len(refusals) == 4


def test_coco_captions_name_pictures_by_their_number_in_another_list(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.png", "b.png"])
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}, {"id": 3}]
    captions = [{"image_id": number, "id": 7, "caption": f"Picture {number}."} for number in (2, 1, 2, 3)]
    path = write_json(tmp_path / "captions_train2014.json", {"info": {}, "images": images, "annotations": captions})
    samples, refusals = read_all(path, "vqa")
    assert [sample.turns[1].text for sample in samples] == ["Picture 2.", "Picture 1.", "Picture 2."]
    files = [sample.pictures[0].files[0] for sample in samples]
    assert files == [(tmp_path / name).read_bytes() for name in ("b.png", "a.png", "b.png")]
    assert len(refusals) == 1
