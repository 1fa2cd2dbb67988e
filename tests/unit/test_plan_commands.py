"""Which words on the command line ask for a layout, so that none is looked for."""

from __future__ import annotations

import pytest

from megavlm.build.run_config import check_for_world
from megavlm.errors import LayoutError
from megavlm.plan_commands import _Asked
from megavlm.recipes import recipe

RUN = recipe("decoder-tiny")


@pytest.mark.parametrize(
    "words",
    [
        ["--tensor-model-parallel-size", "2"],
        ["--tensor-model-parallel-size=2"],
        ["--no-sequence-parallel"],
        ["--num-virtual-stages-per-pipeline-rank", "2"],
        ["--vision-over", "all_stages"],
        ["--recompute-granularity", "full"],
        ["--micro-batch-size", "2"],
        ["--lr", "1e-3", "parallel.pipeline_model_parallel_size=2"],
        ["recompute.granularity=full"],
        ["train.micro_batch_size=2"],
    ],
)
def test_a_layout_that_is_asked_for_is_planned_as_it_is(words: list[str]) -> None:
    assert _Asked("x", RUN, words).has_layout


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["data_parallel.overlap_grad_reduce=true"],
        ["--distributed-timeout-minutes", "30"],
        ["--save", "/x/parallel.run/"],
        ["--save=/x/--recompute-all/sequence-parallel"],
        ["checkpoint.save=/x/parallel.run"],
        ["--global-batch-size", "64", "--load-hf", "with-model-parallel-weights"],
    ],
)
def test_other_settings_leave_the_search_on(words: list[str]) -> None:
    assert not _Asked("x", RUN, words).has_layout


@pytest.mark.parametrize(("batch", "remedy"), [(1, "use 24"), (25, "use 24 or 48"), (47, "use 24 or 48")])
def test_a_batch_that_does_not_divide_is_told_each_remedy_once(batch: int, remedy: str) -> None:
    run = RUN.replace(train=RUN.train.replace(global_batch_size=batch, micro_batch_size=3))
    with pytest.raises(LayoutError) as error:
        check_for_world(run, 8)
    assert error.value.remedy == remedy
