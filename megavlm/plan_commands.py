"""The subcommand `megavlm plan`, a thin function."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from megavlm.build.run_config import RunConfig
from megavlm.curriculum.options import chosen_stages, parse_stage_options, words_of_stages
from megavlm.errors import ConfigError, LayoutError, MegavlmError
from megavlm.options import option_table, parse_options, take_options
from megavlm.plan.as_data import as_data
from megavlm.plan.calibrate import calibrate
from megavlm.plan.cluster import Cluster, parse_cluster
from megavlm.plan.cost import CALIBRATION, Calibration, Decoding, Efficiency
from megavlm.plan.loading import loading_lines
from megavlm.plan.page import PlanPage, check_page_place, write_page
from megavlm.plan.planner import ALONE, OF_SEVERAL, Planner, StagePlan
from megavlm.plan.text import assumptions, stage_report, stages_report
from megavlm.recipes import is_of_a_paper, recipe, stages_of

HELP = ("-h", "--help")
USAGE = """usage: megavlm plan RECIPE[/stage] --cluster NODESxGPUSxCHIP [--data DIR] [--calibration FILE] [--json] ...
       megavlm plan MODEL --cluster NODESxGPUSxCHIP [--stages STAGE,STAGE] [STAGE:--option=VALUE ...] ...
       megavlm plan --calibrate FILE

Whether a run fits on a cluster and how long it takes: all that `megavlm train` takes may follow. A stage without an
option for its layout (degrees of parallelism, recompute, micro-batch) is searched for the fastest one that fits; of a
whole model each stage, for a shorter time, or it gets the layout of a stage before in which the same parts learn.
Nothing is read but, with --data, the indexes of prepared data sets, and no GPU is needed.

  --cluster 5x8xA100-80GB   machines x GPUs of each x chip, or a YAML file
  --data DIR                rows as the prepared data sets in DIR make them; without: as assumed, which is printed
  --calibration FILE        what kernels reach of each chip, in place of megavlm's own figures
  --scale                   time and MFU from 8 to 4,096 GPUs as well, and what limits them
  --html FILE               the plan as a page: memory, timeline, time, layouts
  --json                    plain data (docs/plan_json.md names its fields)
  --calibrate FILE          measure this machine's CPU for half a minute, with the threads that a run would have
                            (OMP_NUM_THREADS), and write it as a YAML file that --cluster takes"""

CALIBRATE = "--calibrate"
LAYOUT = ("parallel.", "recompute.", "train.micro_batch_size")
"""How the paths of the settings begin that make a layout."""
NO_LAYOUT = "parallel.distributed_timeout_minutes"

UNPUBLISHED = (
    "no duration of this run was published, neither hours nor throughput: the plan can be judged plausible, not right"
)


class _Asked(NamedTuple):
    """A stage that is to be planned."""

    name: str
    run: RunConfig
    words: Sequence[str]
    """Options that changed it."""

    @property
    def has_layout(self) -> bool:
        return any(path.startswith(LAYOUT) and path != NO_LAYOUT for path in self._paths())

    def _paths(self) -> Iterator[str]:
        """Of the settings that the words change; values are none."""
        known = option_table(type(self.run))
        for word in self.words:
            name, equals, _ = word.partition("=")
            if name in known:
                yield known[name].path
            elif equals and not name.startswith("-"):
                yield name


def plan(arguments: list[str]) -> int:
    """`megavlm plan RECIPE[/stage] --cluster 5x8xA100-80GB`: memory and time of each stage before it is started."""
    if not arguments or any(word in HELP for word in arguments):
        print(USAGE)
        return 0
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a trace has no data, and needs the same operations on every machine
    if any(word.partition("=")[0] == CALIBRATE for word in arguments):
        return _calibrate(arguments)
    name, *rest = arguments
    own, options = take_options(
        rest, ["--cluster"], ["--data", "--calibration", "--html", "--stages"], flags=["--json", "--scale"]
    )
    cluster = parse_cluster(own["--cluster"])
    if "--html" in own:
        check_page_place(own["--html"])  # before minutes are spent on what it is to show
    efficiency = _efficiency(cluster, own.get("--calibration"))
    asked = _asked(name, options, own.get("--stages"), own.get("--data"))
    decoding = _decoding(own.get("--calibration"))
    planner = Planner(
        cluster, efficiency, decoding, "--data" in own, lambda line: print(line, file=sys.stderr, flush=True)
    )
    plans = []
    for one in asked:
        plans.append(_planned(planner, one, bool(stages_of(name)), "--scale" in own))
        if "--json" not in own:
            print(stage_report(plans[-1], efficiency, decoding), end="\n\n", flush=True)
    if "--html" in own:
        print(_write_page(plans, planner, own["--html"]), file=sys.stderr)
    if "--json" in own:
        print(json.dumps(as_data(name, plans, cluster, efficiency, decoding), indent=1))
    elif stages_of(name):
        print(stages_report(name, plans, cluster))
    _refuse(plans, cluster)
    return 0


def _asked(name: str, options: list[str], stages: str | None, data: str | None) -> list[_Asked]:
    """The stages as the command line changes them."""
    known = stages_of(name)
    if not known:
        run = recipe(name)
        if stages is not None:
            raise ConfigError("--stages", stages, f"{name} is no model of several stages", "leave it out")
        run = parse_options(run, options, prog=f"megavlm plan {name}")
        return [_Asked(name, _with_data(name, run, data), options)]
    chosen = chosen_stages(stages, known)
    runs = parse_stage_options({one: recipe(f"{name}/{one}") for one in known}, options, prog=f"megavlm plan {name}")
    words = words_of_stages(options, known)
    return [_Asked(f"{name}/{one}", _with_data(f"{name}/{one}", runs[one], data), words[one]) for one in chosen]


def _with_data(name: str, run: RunConfig, data: str | None) -> RunConfig:
    if data is None:
        return run
    if run.data is None:
        raise ConfigError("--data", data, f"is nothing to {name}, which reads toy text", "leave it out")
    return run.replace(data=run.data.replace(path=data))


def _planned(planner: Planner, asked: _Asked, is_one_of_several: bool, is_scaled: bool) -> StagePlan:
    """Of several stages one that cannot be judged must not cost the others their plans."""
    try:
        if asked.has_layout:
            plan = planner.given(asked.name, asked.run)
        else:
            plan = planner.found(asked.name, asked.run, OF_SEVERAL if is_one_of_several else ALONE)
    except MegavlmError as error:
        if not is_one_of_several:
            raise
        plan = StagePlan(name=asked.name, asked=asked.run, run=asked.run, refused=error)
    options = " ".join([shlex.join(asked.words), plan.options]).strip()
    plan = replace(plan, options=options, notes=(UNPUBLISHED,) if is_of_a_paper(asked.name) else ())
    return planner.scaled(plan) if is_scaled else plan


def _refuse(plans: Sequence[StagePlan], cluster: Cluster) -> None:
    """End with the error of the one stage that does not work, or with the names of those that do not."""
    problems = [(one.name, one.problem) for one in plans if one.problem is not None]
    if len(plans) == 1 and problems:
        raise problems[0][1]
    if len(problems) == 1:
        name, error = problems[0]
        raise type(error)(f"{name}: {error.where}", error.value, error.problem, error.remedy)
    if problems:
        names = ", ".join(name for name, _ in problems)
        problem = f"{len(problems)} of {len(plans)} stages do not work there: {names}"
        raise LayoutError("--cluster", cluster.name, problem, "each is told above, with its reason and remedy")


def _write_page(plans: Sequence[StagePlan], planner: Planner, html: str) -> str:
    pages = [
        PlanPage(
            name=one.name,
            evaluation=one.evaluation,
            steps=one.steps,
            options=one.options,
            search=one.search,
            scale=one.scale,
            loading=list(loading_lines(one.loading)) if one.loading else [],
            assumptions=[*one.notes, *assumptions(one, planner.efficiency, planner.decoding)],
        )
        for one in plans
        if one.evaluation is not None
    ]
    return write_page(pages, html, {one.name: str(one.refused) for one in plans if one.refused is not None})


def _efficiency(cluster: Cluster, calibration: str | None) -> Efficiency:
    """What is reached of the cluster's chip: as a given file says, as was measured there, as is published."""
    if calibration is None and cluster.efficiency is not None:
        return cluster.efficiency
    return Calibration.load(calibration or CALIBRATION).of(cluster.chip.name)


def _decoding(calibration: str | None) -> Decoding:
    """What a CPU core decodes: as a given file says, or as was measured."""
    given = Calibration.load(calibration).decoding if calibration else None
    found = given or Calibration.load(CALIBRATION).decoding
    assert found is not None
    return found


def _calibrate(arguments: list[str]) -> int:
    own, rest = take_options(arguments, [CALIBRATE])
    if rest:
        raise ConfigError(CALIBRATE, " ".join(rest), "stands beside it", "measure first, then plan with --cluster FILE")
    print(calibrate(own[CALIBRATE]))
    return 0
