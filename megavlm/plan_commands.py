"""The subcommand `megavlm plan`, a thin function."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.build.run_config import RunConfig
from megavlm.errors import ConfigError, LayoutError
from megavlm.options import parse_options, take_options
from megavlm.plan.calibrate import calibrate
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster, parse_cluster
from megavlm.plan.cost import CALIBRATION, Calibration, Efficiency
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.judge import drawn_of, judge, rate_of
from megavlm.plan.mix import Mix, mix_of
from megavlm.plan.page import PlanPage, check_page_place, write_page
from megavlm.plan.report import scale_report, search_report
from megavlm.plan.scale import ScalePoint, scale
from megavlm.plan.search import SearchResult, search
from megavlm.plan.text import as_json, assumptions, report
from megavlm.recipes import recipe, stages_of

HELP = ("-h", "--help")
USAGE = """usage: megavlm plan RECIPE[/stage] --cluster NODESxGPUSxCHIP [--data DIR] [--calibration FILE] [--json] ...
       megavlm plan --calibrate FILE

Whether a run fits on a cluster and how long it takes: all that `megavlm train` takes may follow. A stage without an
option for its layout (degrees of parallelism, recompute, micro-batch) is searched for the fastest one that fits; a
whole model is judged stage by stage, each in its recipe's own layout or the given one. Nothing is read but, with
--data, the indexes of prepared data sets, and no GPU is needed.

  --cluster 5x8xA100-80GB   machines x GPUs of each x chip, or a YAML file
  --data DIR                rows as the prepared data sets in DIR make them; without: as assumed, which is printed
  --calibration FILE        what kernels reach of each chip, in place of megavlm's own figures
  --scale                   time and MFU from 8 to 4,096 GPUs as well, and what limits them
  --html FILE               the plan as a page: memory, timeline, time, layouts
  --json                    plain data
  --calibrate FILE          measure this machine's CPU for half a minute, with the threads that a run would have
                            (OMP_NUM_THREADS), and write it as a YAML file that --cluster takes"""

CALIBRATE = "--calibrate"
LAYOUT_WORDS = ("-model-parallel-", "--num-virtual-stages", "sequence-parallel", "--vision-over", "--recompute-",
                "--micro-batch-size", "parallel.", "recompute.")  # fmt: skip
SEARCH_SECONDS = 40
"""After which no further layout is traced."""


@dataclass
class _Planner:
    """What plans of several stages share."""

    cluster: Cluster
    efficiency: Efficiency
    data: str | None

    def run_of(self, stage: str, options: list[str]) -> RunConfig:
        run = parse_options(recipe(stage), options, prog=f"megavlm plan {stage}")
        rate_of(run, self.cluster, self.efficiency)  # a number format that the chip lacks is no layout's fault
        if self.data is None:
            return run
        if run.data is None:
            raise ConfigError("--data", self.data, f"is nothing to {stage}, which reads toy text", "leave it out")
        return run.replace(data=run.data.replace(path=self.data))

    def judged(self, run: RunConfig, choice: Choice | None = None) -> tuple[Evaluation, Mix]:
        mix = mix_of(run, self.data is not None)
        return judge(run, self.cluster, mix, self.efficiency, choice), mix

    def searched(self, run: RunConfig, is_quiet: bool) -> tuple[RunConfig, SearchResult]:
        """The run in the fastest layout that fits, in its own where none does; and what was found."""
        if self.data is not None:
            mix_of(run, from_data=True)  # what cannot be read is no layout's fault: it is said once, by itself
        began = time.monotonic()
        found = search(
            run,
            self.cluster,
            lambda choice: self.judged(choice.apply(run), choice)[0],
            progress=lambda line: print(line, file=sys.stderr, flush=True),
            is_late=lambda: time.monotonic() - began > SEARCH_SECONDS,
        )
        if not is_quiet:
            print(search_report(found, run), end="\n\n")
        return (found.best[0].evaluation.choice.apply(run) if found.best else run), found

    def scaled(self, run: RunConfig, known: Sequence[Evaluation], mix: Mix) -> list[ScalePoint]:
        """The judged layouts on other numbers of GPUs."""
        return scale(
            run,
            known,
            rate_of(run, self.cluster, self.efficiency),
            images=lambda microbatches, copies: drawn_of(mix, microbatches, copies),
        )


def plan(arguments: list[str]) -> int:
    """`megavlm plan RECIPE[/stage] --cluster 5x8xA100-80GB`: memory and time of each stage before it is started."""
    if not arguments or any(word in HELP for word in arguments):
        print(USAGE)
        return 0
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a trace has no data, and needs the same operations on every machine
    if any(word.partition("=")[0] == CALIBRATE for word in arguments):
        return _calibrate(arguments)
    name, *rest = arguments
    own, options = take_options(rest, ["--cluster"], ["--data", "--calibration", "--html"], flags=["--json", "--scale"])
    cluster = parse_cluster(own["--cluster"])
    if "--html" in own:
        check_page_place(own["--html"])  # before minutes are spent on what it is to show
    efficiency = _efficiency(cluster, own.get("--calibration"))
    planner, as_data = _Planner(cluster, efficiency, own.get("--data")), "--json" in own
    stages = [f"{name}/{stage}" for stage in stages_of(name)]
    is_searched = not stages and not any(word in option for option in options for word in LAYOUT_WORDS)
    hours, found, misfits = 0.0, [], []
    pages: list[PlanPage] = []
    for stage in stages or [recipe(name).name]:
        run = planner.run_of(stage, options)
        found_layouts = None
        if is_searched:
            run, found_layouts = planner.searched(run, as_data)
        evaluation, mix = planner.judged(run)
        hours += evaluation.hours(run.train.train_iters)
        found.append(as_json(run, evaluation, mix))
        misfits += [] if evaluation.fits else [(stage, evaluation.misfit)]
        if not as_data:
            print(report(run, evaluation, mix, efficiency), end="\n\n", flush=True)
        points: list[ScalePoint] = []
        if "--scale" in own:
            judged = [one.evaluation for one in found_layouts.best] if found_layouts else []
            points = planner.scaled(run, judged or [evaluation], mix)
            if not as_data:
                print(scale_report(points), end="\n\n", flush=True)
        pages.append(
            PlanPage(
                name=stage,
                evaluation=evaluation,
                steps=run.train.train_iters,
                search=found_layouts,
                scale=points,
                assumptions=assumptions(run, mix, efficiency),
            )
        )
    if "--html" in own:
        print(write_page(pages, own["--html"]), file=sys.stderr)
    if as_data:
        print(json.dumps(found, indent=1))
    elif stages:
        print(
            f"{name}: {hours:,.1f} hours ({hours / 24:.1f} days), {hours * cluster.gpus:,.0f} GPU-hours in all stages"
        )
    if misfits:
        stage, misfit = misfits[0]
        remedy = "use more tensor or pipeline parallelism, --recompute-granularity full, or shorter rows"
        raise LayoutError(f"{stage} on --cluster", cluster.name, misfit, remedy)
    return 0


def _efficiency(cluster: Cluster, calibration: str | None) -> Efficiency:
    """What is reached of the cluster's chip: as a given file says, as was measured there, as is published."""
    if calibration is None and cluster.efficiency is not None:
        return cluster.efficiency
    return Calibration.load(calibration or CALIBRATION).of(cluster.chip.name)


def _calibrate(arguments: list[str]) -> int:
    own, rest = take_options(arguments, [CALIBRATE])
    if rest:
        raise ConfigError(CALIBRATE, " ".join(rest), "stands beside it", "measure first, then plan with --cluster FILE")
    print(calibrate(own[CALIBRATE]))
    return 0
