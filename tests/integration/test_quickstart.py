"""The quickstart from end to end, with so few steps that nothing is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
from infimm_hf import offline

from megavlm.data.toy_world.world import SAMPLE_KINDS
from megavlm.recipes import stages_of
from megavlm.toy.bases import FAMILY_BASES
from megavlm.toy.course import run_course


@pytest.mark.full  # minutes; its parts have tests of their own
@pytest.mark.parametrize("family", FAMILY_BASES)
def test_a_course_goes_through_all_stages_and_asks_the_exported_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    options = ["--train-iters", "2", "--log-interval", "1"]
    with offline(tmp_path / "modules"):
        samples = dict.fromkeys(SAMPLE_KINDS, 24)
        course = run_course(tmp_path, 5, family=family, questions=3, samples=samples, options=options)
    assert list(course.losses) == list(stages_of(f"{family}-tiny"))
    assert all([step for step, _ in found] == [1, 2] for found in course.losses.values())
    assert (course.trained / "model.safetensors").exists()
    assert {one.question.kind for one in course.asked} == set(course.scores)
    assert len(course.asked) == 6 * len(course.scores)
    for kind, score in course.scores.items():
        right = sum(one.is_right for one in course.asked if one.question.kind == kind)
        assert score.held_out == pytest.approx(right / 6)
