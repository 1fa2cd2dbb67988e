"""MMC4's documents by OpenFlamingo's recipe, and the assignment beneath it."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_data import big_picture, picture, read_all, write_lines

from megavlm.data.readers.assignment import assign
from megavlm.data.sample import Picture


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 5), (5, 2), (4, 6), (0, 3)])
def test_the_assignment_is_the_cheapest_of_all(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(shape))
    for _ in range(20):
        cost = generator.normal(size=shape)
        if generator.random() < 0.3:  # with ties
            cost = np.round(cost)
        pairs = assign(cost)
        short, long = sorted(shape)
        assert len(pairs) == short == len({row for row, _ in pairs}) == len({column for _, column in pairs})
        table = cost if shape[0] <= shape[1] else cost.T
        everything = (sum(table[row, c] for row, c in enumerate(chosen)) for chosen in
                      itertools.permutations(range(long), short))  # fmt: skip
        assert sum(cost[pair] for pair in pairs) == pytest.approx(min(everything))


def record(similarity: list[list[Any]], names: list[str], **more: Any) -> dict[str, Any]:
    sentences = [f"S{index}." for index in range(len(similarity[0]) if similarity else 2)]
    infos = [{"image_name": name} for name in names]
    return {"text_list": sentences, "image_info": infos, "similarity_matrix": similarity, **more}


def test_pictures_stand_before_their_sentences_in_the_order_of_the_tags(tmp_path: Path) -> None:
    for index, name in enumerate("abc"):
        (tmp_path / f"{name}.png").write_bytes(big_picture(index))
    (tmp_path / "small.png").write_bytes(picture(0))
    names = ["a.png", "small.png", "b.png", "gone.png", "c.png"]
    similarity = [
        [0.1, 0.2, 0.50, 0.2],
        [0.9, 0.9, 0.90, 0.9],
        [0.3, 0.2, 0.49, 0.1],  # would like S2 best, which a is likelier to have
        [0.9, 0.9, 0.90, 0.9],
        [0.1, 0.23, 0.10, 0.1],  # below the threshold
    ]
    samples, refusals = read_all(write_lines(tmp_path / "x.jsonl", [record(similarity, names)]), "mmc4")
    assert samples[0].text == "<image>S0. S1.<image>S2. S3."
    assert samples[0].pictures == (Picture((big_picture(1),)), Picture((big_picture(0),)))
    assert [refusal.reason for refusal in refusals] == ["left out of a document: 1 x picture missing"]


def test_base64_pictures_and_the_first_six_of_the_list(tmp_path: Path) -> None:
    infos = [{"image_base64": base64.b64encode(big_picture(k)).decode()} for k in range(8)]
    similarity = (np.fliplr(np.eye(8)) * 0.5).tolist()  # picture k belongs to sentence 7 - k
    made = record(similarity, []) | {"image_info": infos}
    sample = read_all(write_lines(tmp_path / "x.jsonl", [made]), "mmc4")[0][0]
    assert sample.text == "S0. S1." + "".join(f"<image>S{k}." for k in range(2, 8))
    assert [item.files[0] for item in sample.pictures] == [big_picture(k) for k in (5, 4, 3, 2, 1, 0)]


def test_half_of_the_documents_with_one_picture_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(big_picture(0))
    records = [record([[0.5, 0.1]], ["a.png"], url=f"http://{number}") for number in range(200)]
    path = write_lines(tmp_path / "x.jsonl", records)
    samples, refusals = read_all(path, "mmc4")
    assert 70 < len(samples) < 130
    assert {refusal.reason for refusal in refusals} == {"one picture only: of such documents a share is kept"}
    assert read_all(path, "mmc4") == (samples, refusals)
    assert len(read_all(path, "mmc4", single_picture_share=1.0)[0]) == 200


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (record([[0.1, 0.2]], ["a.png"]), "no picture left: none is like any sentence"),
        (record([], []), "no picture left: the document has none"),
        (record([[0.5]], ["a.png", "a.png"]), "lists differ in length"),
        (record([[0.5, "x"]], ["a.png"]), "wrong type: similarity_matrix"),
        (record([[0.5, float("nan")]], ["a.png"]), "wrong type: similarity_matrix"),
        (record([[0.5, 10**400]], ["a.png"]), "wrong type: similarity_matrix"),
        (record([[0.5, 0.1]], ["a.png"]) | {"text_list": "ab"}, "wrong type: text_list"),
        (record([[0.5, 0.1]], ["a.png"]) | {"text_list": ["", "<image>"]}, "tags and pictures disagree"),
        (record([[0.1, 0.5]], ["a.png"]) | {"text_list": ["S", " "]}, "nothing behind the only picture"),
        (record([[0.5, 0.1]], ["../a.png"]), "no picture left: 1 x path leaves the folder of pictures"),
    ],
)
def test_a_bad_document_is_refused(tmp_path: Path, made: dict[str, Any], reason: str) -> None:
    (tmp_path / "images").mkdir()
    for folder in (tmp_path, tmp_path / "images"):
        (folder / "a.png").write_bytes(big_picture(0))
    path = write_lines(tmp_path / "x.jsonl", [made])
    samples, refusals = read_all(path, "mmc4", images=str(tmp_path / "images"), single_picture_share=1.0)
    assert samples == []
    assert refusals[0].reason.startswith(reason)
