"""The page of a plan: well-formed, of one piece, with all that the plan says, and nothing that names smuggle in."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections import Counter
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plan_profiles import MadeModel, evaluated, rate

from megavlm.errors import ConfigError
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import parse_cluster
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.page import MEMORY_NAMES, PlanPage, page_of, write_page
from megavlm.plan.page_drawings import MOST_PASSES, SLACK_NAME
from megavlm.plan.profile import MemoryUse
from megavlm.plan.scale import scale
from megavlm.plan.search import Failure, Ranked, SearchResult
from megavlm.recipes import recipe

EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
CLUSTER = parse_cluster("2x8xA100-80GB")
MODEL = MadeModel(
    layers=40, tower_flops=2e12, head_flops=2e12, message=4e7, tensor_message=5e7, gradients=1e9, is_frozen=True
)
VOID = {"meta", "path", "rect", "img"}


class Elements(HTMLParser):
    """Checks that elements close in order, and counts them and their classes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.words: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.classes.update((given.get("class") or "").split())
        assert not {name for name in given if name.startswith("on") or name in ("src", "style")}
        assert not (given.get("href") or "#").startswith("http")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluated(MODEL, Choice(tensor=2, pipeline=4, sequence_parallel=True), CLUSTER, 64)


def full(evaluation: Evaluation, name: str = "infimm/pretrain") -> PlanPage:
    run = recipe("infimm-llama2-13b/pretrain")
    found = SearchResult(
        best=(Ranked(evaluation, f"fast {name}"),),
        failures=(Failure(Choice(tensor=16), f"16 does not divide {name}"),),
        considered=7,
        refused=2,
        traced=3,
        untried=1,
    )
    return PlanPage(
        name=name,
        evaluation=evaluation,
        steps=1000,
        options="--tensor-model-parallel-size 2",
        search=found,
        scale=scale(run, [evaluation], rate),
        loading=["the loader reads 5 pictures/s"],
        assumptions=[f"rows of {name}"],
    )


def test_the_page_is_well_formed_and_of_one_piece(evaluation: Evaluation) -> None:
    page = page_of([full(evaluation)])
    found = Elements(page)
    assert found.tags["script"] == found.tags["link"] == found.tags["img"] == 0 and "url(http" not in page
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page and "default-src 'none'" in page


def test_all_that_the_plan_says_is_there(evaluation: Evaluation) -> None:
    found = Elements(page_of([full(evaluation)]))
    words = " ".join(found.words)
    for said in (
        f"{evaluation.seconds:.3g} s",
        f"{evaluation.mfu:.1%}",
        "It fits.",
        "1,000 steps",
        "Where a step's time goes",
        "16 does not divide",
        "fast infimm",
        "64 rows for 128 copies of the model",
        "312 TFLOP/s",
        "rows of infimm",
    ):
        assert said in words, said
    passes = evaluation.step.pipeline.timeline
    assert found.classes["p-forward"] + found.classes["p-backward"] == len(passes) + 2  # the legend's
    assert found.classes["mark"] == len(evaluation.profiles)
    assert found.classes["m-weights"] == len(evaluation.profiles) + 1
    assert found.classes["t-tower"] == 2 and found.classes["t-bubble"] == 2


def test_what_does_not_fit_is_said_at_the_top() -> None:
    heavy = evaluated(dataclasses.replace(MODEL, layer_bytes=8 << 30), Choice(pipeline=2), CLUSTER, 64)
    found = Elements(page_of([PlanPage(name="x", evaluation=heavy, steps=1)]))
    assert found.classes["bad"] == 1 and heavy.misfit + "." in found.words and found.classes["over"] == 2


def test_names_cannot_smuggle_anything_in(evaluation: Evaluation) -> None:
    chip = CLUSTER.chip.replace(name=EVIL)
    smuggled = dataclasses.replace(evaluation, cluster=CLUSTER.replace(chip=chip))
    page = page_of([dataclasses.replace(full(smuggled, EVIL), options=EVIL)])
    found = Elements(page)
    assert found.tags["script"] == found.tags["img"] == 0 and any(EVIL in words for words in found.words)


def test_a_long_pipeline_shows_its_ends() -> None:
    long = evaluated(MODEL, Choice(pipeline=4), CLUSTER, 4 * 1000)
    passes = long.step.pipeline.timeline
    assert len(passes) > 2 * MOST_PASSES
    page = page_of([PlanPage(name="x", evaluation=long, steps=1)])
    found = Elements(page)
    drawn = found.classes["p-forward"] + found.classes["p-backward"] - 2
    assert 2 * MOST_PASSES - 20 <= drawn <= 2 * MOST_PASSES + 20 and found.classes["cut"] == 1
    assert len(page) < 600_000


def test_one_stage_has_no_timeline_and_several_runs_have_contents(evaluation: Evaluation) -> None:
    alone = evaluated(MODEL, Choice(), CLUSTER, 64)
    found = Elements(page_of([PlanPage(name=name, evaluation=alone, steps=5) for name in ("first", "second")]))
    assert found.classes["timeline"] == 0 and found.tags["nav"] == 1 and found.tags["article"] == 2


def test_a_stage_without_a_plan_is_told() -> None:
    found = Elements(page_of([], {"a/b": f"80 {EVIL}"}))
    assert found.classes["bad"] == 1 and f"It has no plan: 80 {EVIL}." in found.words and found.tags["script"] == 0


def test_every_kind_of_memory_has_a_name_and_a_colour() -> None:
    assert set(MEMORY_NAMES) == {field.name for field in fields(MemoryUse)} | {SLACK_NAME}


def test_the_page_is_written_or_refused(evaluation: Evaluation, tmp_path: Path) -> None:
    said = write_page([full(evaluation)], str(tmp_path / "plan.html"))
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == page_of([full(evaluation)]) and "plan.html" in said
    for bad in (str(tmp_path), str(tmp_path / "no" / "plan.html"), ""):
        with pytest.raises(ConfigError, match="--html"):
            write_page([full(evaluation)], bad)
