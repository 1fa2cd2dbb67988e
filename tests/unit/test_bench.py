"""The benchmarks: their statistics, their refusal to print wrong rows, and that each of them runs."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

from megavlm import cli
from megavlm.batch import IGNORED, TextBatch
from megavlm.bench import report
from megavlm.bench import run as bench
from megavlm.bench.checkpoint import Needs
from megavlm.bench.harness import (
    Comparison,
    DisagreementError,
    Figure,
    Measurement,
    NoRowError,
    Pass,
    Side,
    SkippedError,
    figure,
    measure,
    ratio_of,
    times_of,
)
from megavlm.bench.kernels import figure_of
from megavlm.bench.processes import environment, watched
from megavlm.bench.real_aquila_vl import AquilaVL
from megavlm.bench.real_infimm import InfiMM
from megavlm.bench.real_step import Workload, planned_figures, work_of
from megavlm.bench.report import append, machine, table
from megavlm.build.families import state_map_of
from megavlm.build.model import build_model
from megavlm.model.decoder.model import Decoder
from megavlm.parallel import groups as parallel_groups
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.plan.profile import MemoryUse
from megavlm.plan.rows import batch_of
from megavlm.plan.trace import tensors_of
from megavlm.recipes import recipe
from megavlm.testing import spawn
from megavlm.train.optim import build_optimizer

GPU_ALONE, CPU_ALONE = ["kernels"], ["adapter", "planned-step"]
"""Benchmarks that a machine without a GPU skips, and those that one with a GPU skips."""
IN_PROCESSES = ["start-up", "checkpoint-1b", "checkpoint-1b-trained", "plan", "planned-step"]
"""Benchmarks that take long even at toy size."""


def comparison(ours: list[Pass], theirs: list[Pass], warmup: int = 0, calls: list[str] | None = None) -> Comparison:
    """Sides that replay these passes, and note in `calls` whose turn it was."""

    def side(name: str, passes: list[Pass]) -> Side:
        remaining = iter(passes)

        def run() -> Pass:
            if calls is not None:
                calls.append(name)
            return next(remaining)

        return Side(name, run)

    return Comparison(
        benchmark="made-up",
        case="nothing",
        ours=side("ours", ours),
        theirs=side("theirs", theirs),
        target=1.05,
        rounds=len(ours) - warmup,
        warmup=warmup,
    )


def passes(*seconds: float, loss: float = 2.0) -> list[Pass]:
    return [Pass(one, loss) for one in seconds]


def test_sides_take_turns_and_warm_up_rounds_are_not_timed() -> None:
    calls: list[str] = []
    row = measure(comparison(passes(9.0, 0.1, 0.3), passes(9.0, 0.2, 0.2), warmup=1, calls=calls))
    assert calls == ["ours", "theirs"] * 3
    assert row.rounds == 2
    assert row.times["ours"].min == pytest.approx(100.0)
    assert row.times["theirs"].p80 == pytest.approx(200.0)
    assert row.ratio is not None and row.ratio.median == pytest.approx(1.0)


def test_times_are_minimum_median_and_p80_in_milliseconds() -> None:
    times = times_of([0.006, 0.001, 0.003, 0.005, 0.002, 0.004])
    assert (times.min, times.median, times.p80) == pytest.approx((1.0, 3.5, 5.0))


def test_the_ratio_is_taken_pair_by_pair() -> None:
    # Both halves of the middle pairs are slowed down; the ratio of the medians would be 3.5 / 2.
    ratio = ratio_of([1.1, 5.0, 2.0, 0.9], [1.0, 5.0, 2.0, 1.0])
    assert (ratio.median, ratio.p20, ratio.p80) == pytest.approx((1.0, 0.96, 1.04))


@pytest.mark.parametrize("loss", [2.001, float("nan")])
def test_no_row_where_the_losses_differ(loss: float) -> None:
    ours = [*passes(0.1), Pass(0.1, loss)]
    with pytest.raises(DisagreementError, match=rf"made-up: round 1: loss {loss} of ours, 2\.0 of theirs; .* 0\.0001"):
        measure(comparison(ours, passes(0.1, 0.1)))


def test_losses_are_checked_while_warming_up() -> None:
    with pytest.raises(DisagreementError, match="round 0"):
        measure(comparison([Pass(0.1, 1.0), *passes(0.1)], passes(0.1, 0.1), warmup=1))


def test_a_disagreement_ends_in_an_exit_code_and_leaves_the_other_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    @contextmanager
    def right(quick: bool) -> Iterator[Comparison]:
        yield comparison(passes(0.1), passes(0.1))

    @contextmanager
    def wrong(quick: bool) -> Iterator[Comparison]:
        yield comparison(passes(0.1), passes(0.1, loss=3.0))

    monkeypatch.setattr(bench, "BENCHMARKS", {"wrong": wrong, "right": right})
    assert bench.run(out=tmp_path / "rows.json") == 1
    printed = capsys.readouterr()
    assert "no row: made-up: round 0" in printed.err
    assert printed.out.count("made-up") == 2  # what it computes, and its line of the table
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 1


def test_the_table_is_aligned_and_rows_are_appended(tmp_path: Path) -> None:
    row = measure(comparison(passes(0.0123), passes(0.012)))
    facts: dict[str, str | int] = {"cpu": "a processor", "cores": 2}
    lines = table([row], facts).splitlines()
    assert lines[0] == "cpu: a processor  cores: 2"
    header, ours, theirs = lines[-3:]
    assert ours.split() == ["made-up", "ours", *["12.30"] * 3, "1.025", "1.025", "-", "1.025", "<=", "1.05"]
    assert theirs.split() == ["theirs", *["12.00"] * 3]
    assert len(header) == len(ours)
    assert header.index("p80 ms") + len("p80 ms") == ours.rindex("12.30") + 5 == theirs.rindex("12.00") + 5
    for _ in range(2):
        append([row], facts, tmp_path / "rows.json")
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert first == second
    assert first["times"]["ours"] == {"min": 12.3, "median": 12.3, "p80": 12.3}
    assert first["machine"] == facts


def test_the_machine_is_told_by_its_parts() -> None:
    facts = machine()
    assert {"cpu", "cores", "threads", "torch", "megatron-core", "commit"} <= facts.keys()
    assert facts["torch"] == torch.__version__


def test_a_measurement_without_another_side_is_a_row_of_figures(tmp_path: Path) -> None:
    seconds = figure("seconds of a plan", "s", [3.0, 1.0, 7.0], target=30.0)
    row = measure(Measurement("made-up", "nothing", lambda: [seconds, figure("memory", "GB", [0.51234])]))
    *_, header, first, second = table([row], {}).splitlines()
    assert first.split() == ["made-up", "seconds", "of", "a", "plan", "3.00", "1.00", "-", "7.00", "s", "<=", "30"]
    assert second.split() == ["memory", "0.51", "0.51", "-", "0.51", "GB"]
    assert len(header) == len(first)
    append([row], {"cpu": "a processor"}, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {
            "benchmark": "made-up",
            "case": "nothing",
            "figures": {
                "seconds of a plan": {"unit": "s", "median": 3.0, "min": 1.0, "max": 7.0, "target": 30.0},
                "memory": {"unit": "GB", "median": 0.512, "min": 0.512, "max": 0.512},
            },
            "machine": {"cpu": "a processor"},
        }
    ]


def test_figures_beside_times_are_asked_behind_the_last_round() -> None:
    calls: list[str] = []
    two = replace(comparison(passes(0.1, 0.2), passes(0.1, 0.2), calls=calls), target=None)
    row = measure(replace(two, figures=lambda: [figure("calls", "", [len(calls)])]))
    assert row.figures[0].median == 4
    *_, times, theirs, _, _, figures = table([row], {}).splitlines()
    assert (
        times.endswith("1.000 - 1.000")
        and theirs.startswith(" ")
        and figures.split()[:3]
        == [
            "made-up",
            "calls",
            "4.00",
        ]
    )


def test_what_fails_or_is_skipped_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def right(quick: bool) -> Iterator[Comparison]:
        yield comparison(passes(0.1), passes(0.1))

    @contextmanager
    def broken(quick: bool) -> Iterator[Comparison]:
        raise RuntimeError("out of memory")
        yield

    @contextmanager
    def elsewhere(quick: bool) -> Iterator[Comparison]:
        raise SkippedError("needs a GPU")
        yield

    monkeypatch.setattr(bench, "BENCHMARKS", {"broken": broken, "elsewhere": elsewhere, "right": right, "big": broken})
    monkeypatch.setattr(bench, "ON_REQUEST", ("big",))
    assert bench.run() == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("elsewhere: skipped: needs a GPU\n") and "made-up" in printed.out
    assert "no row: broken: RuntimeError: out of memory\n" in printed.err and "big" not in printed.err
    assert bench.run(["elsewhere"]) == 0


def test_a_checkout_keeps_the_rows_by_machine_and_day(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    @contextmanager
    def right(quick: bool) -> Iterator[Comparison]:
        yield comparison(passes(0.1), passes(0.1))

    @contextmanager
    def wrong(quick: bool) -> Iterator[Comparison]:
        yield comparison(passes(0.1), passes(0.1, loss=3.0))

    monkeypatch.setattr(bench, "BENCHMARKS", {"right": right, "wrong": wrong})
    monkeypatch.setattr(report, "kept_place", lambda: tmp_path)
    assert cli.main(["bench", "--quick"]) == 1 and not list(tmp_path.iterdir())
    assert cli.main(["bench", "--only", "wrong"]) == 1 and not list(tmp_path.iterdir())
    capsys.readouterr()
    assert cli.main(["bench"]) == 1
    kept = tmp_path / report.file_name(machine(), date.today())
    assert capsys.readouterr().out.endswith(f"the rows are in {kept}\n")
    assert cli.main(["bench", "--only", "right"]) == 0 and len(json.loads(kept.read_text())) == 2
    elsewhere = tmp_path / "mine.json"
    assert cli.main(["bench", "--only", "right", "--out", str(elsewhere)]) == 0
    assert len(json.loads(kept.read_text())) == 2 and len(json.loads(elsewhere.read_text())) == 1


def test_the_file_of_a_machine_is_named_by_its_gpu_and_the_day() -> None:
    day = date(2026, 5, 31)
    assert report.file_name({"cpu": "AMD EPYC 7B13 (64-Core)"}, day) == "amd-epyc-7b13-64-core-2026-05-31.json"
    facts: dict[str, str | int] = {"cpu": "any", "gpu": "NVIDIA H100 80GB HBM3"}
    assert report.file_name(facts, day) == "nvidia-h100-80gb-hbm3-2026-05-31.json"
    place = report.kept_place()
    assert place is None or (place / "data-path.json").is_file()


def test_a_time_limit_loses_no_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def right(quick: bool) -> Iterator[Comparison]:
        yield comparison(passes(0.1), passes(0.1))

    @contextmanager
    def long(quick: bool) -> Iterator[Comparison]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield comparison(passes(0.1), passes(0.1))

    monkeypatch.setattr(bench, "BENCHMARKS", {"right": right, "long": long})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        bench.run(out=tmp_path / "rows.json")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.json").write_text("{}")
    for arguments, said in (
        (["--only", "decoder-stp"], "--only = 'decoder-stp': no such benchmark; did you mean decoder-step?"),
        (["--only"], "--only = None: has no value"),
        (["--only", "stalls", "--out", f"{tmp_path}/none/rows.json"], "there is no folder"),
        (["--out", f"{tmp_path}/notes.json"], "cannot be read as a list of rows"),
        (["--out", str(tmp_path)], "cannot be read as a list of rows"),
        (["--fast"], "'--fast': is no option of bench"),
    ):
        assert cli.main(["bench", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_the_list_says_what_each_benchmark_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(bench.BENCHMARKS)
    about = (sys.modules["megavlm.bench.decoder_step"].__doc__ or "").splitlines()[0]
    assert re.split(r"\s{2,}", lines[1]) == ["decoder-step", about]


def quick_rows(names: list[str], path: str) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = bench.run(names, quick=True, out=path)
    return code, said.getvalue()


@pytest.mark.parametrize(
    "names",
    [
        [name for name in bench.BENCHMARKS if name not in IN_PROCESSES],
        pytest.param(IN_PROCESSES, marks=pytest.mark.full),  # a minute
    ],
    ids=["here", "in processes of their own"],
)
def test_each_benchmark_runs(names: list[str], tmp_path: Path) -> None:
    ((code, said),) = spawn(quick_rows, 1, names, str(tmp_path / "rows.json"), timeout=600)
    assert code == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    skipped = [line.partition(":")[0] for line in said.splitlines() if ": skipped: " in line]
    expected = [name for name in names if name not in skipped]
    assert list(dict.fromkeys(row["benchmark"] for row in rows)) == expected
    left_out = CPU_ALONE if torch.cuda.is_available() else GPU_ALONE
    assert skipped == [name for name in names if name in left_out]
    for row in rows:
        if row["benchmark"] in ("aquila-vl-2b", "infimm-7b"):
            planned = row["figures"]["megavlm: GPU memory planned"]["median"]
            assert 0.001 < planned < 1  # GB, at toy size
        assert "times" in row or row["figures"]
        assert all(times["min"] > 0 for times in row.get("times", {}).values())
        assert row.get("ratio", {"median": 1.0})["median"] > 0


def test_a_command_is_timed_line_by_line_and_its_memory_is_its_own() -> None:
    here = bytearray(400_000_000)  # what its parent holds must not count
    here[::4096] = b"\1" * len(here[::4096])
    code = (
        "import time; print('one', flush=True); time.sleep(0.3); x = b'1' * 200_000_000; time.sleep(0.1); print('two')"
    )
    done = watched([sys.executable, "-c", code])
    first, second = done.reached("one")[0], done.reached("two")[0]
    assert 0 < first < second - 0.3 < done.seconds
    assert 200_000_000 < done.peak < 300_000_000
    with pytest.raises(NoRowError, match=r"did not say 'three', but: one\ntwo"):
        done.reached("three")


def test_a_command_that_fails_gives_its_last_words() -> None:
    with pytest.raises(NoRowError, match=r"exit code 3: half\nno room"):
        watched([sys.executable, "-c", "import sys; print('half'); print('no room', file=sys.stderr); sys.exit(3)"])


def test_ranks_of_torchrun_are_not_handed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & environment().keys()


def test_a_large_checkpoint_needs_memory_and_disk(tmp_path: Path) -> None:
    Needs(memory=0, disk=0).check(tmp_path)
    for needs, said in ((Needs(memory=1e6, disk=0), "1e+06 GB of memory"), (Needs(memory=0, disk=1e9), "GB of disk")):
        with pytest.raises(SkippedError, match=re.escape(said)):
            needs.check(tmp_path)


def test_a_row_of_the_kernels_table_becomes_a_figure() -> None:
    row = {"op": "tile_pack", "shape": "a shape", "passes": "forward", "ms_p50": "2.0", "ms_p20": "1.5", "ms_p80": "4"}
    plain = figure_of({**row, "variant": "plain", "speedup_over_plain": "1.00", "share_of_roof": "0.30"})
    assert plain == Figure("tile_pack, a shape, forward: plain", "ms (p20 - p80)", 2.0, 1.5, 4.0)
    kernel = figure_of({**row, "variant": "kernel", "speedup_over_plain": "2.50", "share_of_roof": "0.75"})
    assert kernel.name.endswith(": kernel (2.50 times as fast as plain, 0.75 of the roof)")


@pytest.mark.parametrize("workload", [AquilaVL(False), InfiMM(False)], ids=lambda workload: workload.name)
def test_the_real_models_get_the_same_samples_on_both_sides(workload: Workload) -> None:
    ours, theirs = workload.our_step(3), workload.their_step(3)
    assert workload.run.data is not None
    assert all(batch.tokens.size(1) <= workload.run.data.rows.max_tokens for batch in ours)
    assert all(batch.tokens.size(1) % 16 == 0 for batch in ours)  # as FP8 asks for
    targets = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in theirs)
    assert sum(int(batch.target_tokens) for batch in ours) == targets > 1000
    media = [batch.media for batch in ours if batch.media is not None]
    given = sum(batch["images" if "images" in batch else "batch_num_images"].size(0) for batch in theirs)
    assert len(media) == len(ours) and given == sum(len(lengths_of(batch)) for batch in ours)
    seen = [batch.cu_seqlens.diff().square().sum() for batch in ours if batch.cu_seqlens is not None]
    assert work_of(ours).pairs == float(sum(seen) + work_of(ours).tokens) / 2


@pytest.mark.parametrize("workload", [AquilaVL(True), InfiMM(True)], ids=lambda workload: workload.name)
def test_a_plan_is_asked_of_the_very_rows_that_are_measured(workload: Workload) -> None:
    def everything(tiles: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        return [tuple(range(len(row))) for row in tiles]

    for ours, planned in zip(workload.our_step(2), workload.planned_step(2), strict=True):
        batch = batch_of(workload.run, planned, everything)
        assert lengths_of(batch) == lengths_of(ours)
        sizes, own = ([(one.shape, one.dtype) for one in tensors_of(of)] for of in (batch, ours))
        assert sizes == own


def test_the_planned_memory_stands_beside_the_measured_one() -> None:
    memory = MemoryUse(weights=4, gradients=3, optimizer=2, activations=1, batch=1, communication=7)
    scaled = MemoryUse(**{name: size * 10**9 for name, size in vars(memory).items()})
    (alone,) = planned_figures(scaled, None)
    assert alone.name == "megavlm: GPU memory planned" and alone.median == 11
    _, ratio = planned_figures(scaled, 10 * 10**9)
    assert ratio.name.endswith("planned / allocated") and ratio.median == pytest.approx(1.1)


def lengths_of(batch: TextBatch) -> list[int]:
    assert batch.cu_seqlens is not None
    return list(batch.cu_seqlens.diff().tolist())


@pytest.mark.parametrize("workload", [AquilaVL(False), InfiMM(False)], ids=lambda workload: workload.name)
def test_the_real_models_of_transformers_have_the_shapes_that_ours_reads(workload: Workload) -> None:
    """Transformers saves tensors under other names than it holds them, and a tied one once: shapes are counted."""
    with torch.device("meta"):
        theirs = Counter(tuple(tensor.shape) for tensor in workload.fresh_model().state_dict().values())
    ours = Counter(state_map_of(workload.run).folder_shapes().values())
    vocabulary = (workload.run.decoder.vocab_size, workload.run.decoder.hidden_size)
    assert theirs.pop(vocabulary) == 2 and ours.pop(vocabulary) == (1 if workload.run.decoder.tied_embeddings else 2)
    assert theirs == ours


# --- what makes the step fast must not change what it computes ---------------------------------------------------


def optimizer_switches() -> list[bool]:
    run = recipe("decoder-tiny")
    parallel_groups.join()
    groups = parallel_groups.start(run.parallel)
    optimizer, _ = build_optimizer(wrap_data_parallel(list(build_model(run, groups).chunks), run.data_parallel), run)
    return [group["fused"] for group in optimizer.param_groups if "fused" in group]


def test_torch_adamw_is_the_fused_one() -> None:
    (switches,) = spawn(optimizer_switches, 1)
    if not torch.cuda.is_available():
        assert switches, "no optimizer of torch's where there is no other"
    assert all(switches)


def loss_of_padded_vocabulary() -> list[tuple[float, float]]:
    """[loss, and norm of the gradient of the padded rows] of a vocabulary of 100, padded to 112 and not at all."""
    found = []
    for divisor in (16, 1):
        run = recipe("decoder-tiny").replace(make_vocab_size_divisible_by=divisor)
        parallel_groups.join()
        groups = parallel_groups.start(run.parallel)
        (chunk,) = build_model(run, groups).chunks
        assert isinstance(chunk, Decoder)
        tokens = torch.arange(64)[None] % run.decoder.vocab_size
        loss = chunk(tokens, None, None, labels=tokens.roll(-1, 1)).mean()
        loss.backward()
        weight = chunk.output_layer.weight
        found.append((loss.item(), weight.grad[run.decoder.vocab_size :].norm().item()))
        parallel_groups.stop()
    return found


def test_padded_rows_of_the_vocabulary_take_no_part() -> None:
    ((padded, plain),) = spawn(loss_of_padded_vocabulary, 1)
    assert padded == pytest.approx(plain, rel=1e-6)
    assert padded[1] == 0.0


def clipped_by_adapter() -> list[list[float]]:
    from megatron.core.optimizer import clip_grads

    parallel_groups.join()
    gradient = torch.tensor([3.0, 4.0])
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = gradient
    clip_grads.clip_grad_by_total_norm_fp32([parameter], 1.0, 5.0)
    assert parameter.grad.data_ptr() == gradient.data_ptr()
    return [gradient.tolist()]


def test_clipping_scales_the_gradient_in_place() -> None:
    ((clipped,),) = spawn(clipped_by_adapter, 1)
    assert clipped == pytest.approx([0.6, 0.8], rel=1e-5)


def reduced_over_ranks(overlap: bool) -> list[float]:
    """Four numbers, rank + 1 on each rank, reduce-scattered and gathered again as megatron-core's buffers do it."""
    from megatron.core.distributed import param_and_grad_buffer

    parallel_groups.join()
    groups = parallel_groups.start(recipe("decoder-tiny").parallel)
    group = groups.collection.dp
    source = torch.full((4,), float(groups.rank + 1))
    mine = source[groups.rank * (4 // groups.world_size) :][: 4 // groups.world_size]
    work = param_and_grad_buffer.dist_reduce_scatter_func(
        mine, source, op=torch.distributed.ReduceOp.SUM, group=group, async_op=overlap
    )
    if work is not None:
        work.wait()
    whole = torch.zeros(4)
    shard = whole[groups.rank * (4 // groups.world_size) :][: 4 // groups.world_size]
    shard.copy_(mine)
    work = param_and_grad_buffer.dist_all_gather_func(whole, shard, group=group, async_op=overlap)
    if work is not None:
        work.wait()
    return whole.tolist()


@pytest.mark.parametrize(("ranks", "overlap"), itertools.product((1, 2), (False, True)))
def test_gradients_are_reduced_over_one_rank_and_over_two(ranks: int, overlap: bool) -> None:
    expected = [1.0] * 4 if ranks == 1 else [3.0] * 4
    assert spawn(reduced_over_ranks, ranks, overlap) == [expected] * ranks


def test_a_side_beside_is_timed_each_round_and_stays_out_of_the_ratio() -> None:
    calls: list[str] = []
    two = comparison(passes(9.0, 0.1, 0.3), passes(9.0, 0.2, 0.6), warmup=1, calls=calls)
    floor = iter(passes(9.0, 0.01, 0.03, loss=7.0))
    row = measure(replace(two, beside=Side("floor", lambda: next(floor))))
    assert row.ratio is not None and row.ratio.median == pytest.approx(0.5)
    assert list(row.times) == ["ours", "theirs", "floor"] and row.times["floor"].min == pytest.approx(10.0)
