"""What a trace says beside memory: frozen parts, layers that stand for others, rows like those of the loader."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from plan_profiles import rate
from prepared_toys import data_config, prepare_toys, stream
from reports import groups_of_one, report_of
from toy_data import write_tokenizer

from megavlm.build.loader import build_loader, build_words
from megavlm.build.model import Model
from megavlm.build.run_config import ChatConfig, RunConfig
from megavlm.data.step_plan import Planner, open_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.parallel import groups as process_groups
from megavlm.parallel.imagined import imagined_world
from megavlm.plan import trace as tracing
from megavlm.plan.cluster import parse_cluster
from megavlm.plan.cost import CALIBRATION, Calibration
from megavlm.plan.judge import judge
from megavlm.plan.mix import _with_more_words, mix_of
from megavlm.plan.profile import OpCost, StageProfile
from megavlm.plan.rows import PlannedDocument, PlannedRow, batch_of
from megavlm.plan.seen import prepared_steps
from megavlm.plan.stage import Traces, profile_run
from megavlm.plan.step import drawn_rows, step_time
from megavlm.plan.trace import own_pictures, trace_microbatch, trace_step, traced_rank
from megavlm.recipes import recipe
from megavlm.testing import spawn
from megavlm.tiles import GridConfig, plan_image
from megavlm.train.throughput import Speedometer
from megavlm.train.work import work_of_plan


def infimm(stage: str, **changes: Any) -> tuple[RunConfig, PlannedRow]:
    run = recipe(f"infimm-tiny/{stage}").replace(**changes)
    assert run.infimm is not None
    tower = run.infimm.tower
    picture = plan_image(64, 64, "image", GridConfig(tile_size=tower.image_size, patch_size=8, tiling="single"))
    return run, PlannedRow((PlannedDocument(40, (picture,)), PlannedDocument(50, (picture, picture))), 96)


def flops(costs: tuple[OpCost, ...]) -> dict[str, float]:
    """Of products, by part and phase."""
    found: Counter[str] = Counter()
    for cost in costs:
        if cost.kind == "matmul":
            found[f"{cost.part} {cost.phase}"] += int(cost.flops)
    return dict(found)


def pretraining_and_finetuning() -> list[tuple[dict[str, float], int, tuple[int, ...], int]]:
    found = []
    for stage in ("pretrain", "finetune"):
        run, row = infimm(stage)
        with traced_rank(run, 1, 0) as rank:
            step = trace_step(rank)
            found.append(
                (flops(trace_microbatch(rank, row, None).costs), step.trainable, tuple(step.static), step.parameters)
            )
    return found


def test_frozen_parts_cost_no_weight_gradients() -> None:
    (found,) = spawn(pretraining_and_finetuning, 1, timeout=600)
    (pretrain, trained, static, _), (finetune, all_trained, all_static, parameters) = found
    for costs in (pretrain, finetune):
        assert "tower backward" not in costs
        assert costs["cross_attention backward"] == 2 * costs["cross_attention forward"]
        assert costs["tower forward"] == pretrain["tower forward"]
    # Both products of the decoder's layers are there forward; frozen, backward makes the input's gradient alone.
    assert pretrain["decoder backward"] == pretrain["decoder forward"]
    assert finetune["decoder backward"] == 2 * finetune["decoder forward"]
    # Gradients in float32, and two moments beside the weights, which are float32 themselves: of what learns alone.
    for (_, gradients, optimizer), learns in ((static, trained), (all_static, all_trained)):
        assert gradients == pytest.approx(4 * learns, rel=0.01)
        assert optimizer == pytest.approx(8 * learns, rel=0.01)
    assert trained < all_trained < parameters


def with_and_without_representatives(recompute: dict[str, Any]) -> list[Any]:
    """A deep model, traced with a layer of each kind, and with all."""
    run, row = infimm("finetune")
    run = run.with_changes([("decoder.num_layers", 10), *((f"recompute.{name}", x) for name, x in recompute.items())])
    found = []
    for all_layers in (False, True):
        with traced_rank(run, 1, 0) as rank:
            unit = tracing.unit_of
            tracing.unit_of = (lambda run: None) if all_layers else unit
            traced = trace_microbatch(rank, row, None)
            tracing.unit_of = unit
        costs = {(c.part, c.kind, c.phase): (c.flops, c.bytes, c.count) for c in traced.costs}
        found.append((tuple(traced.memory), costs))
    return found


@pytest.mark.parametrize("recompute", [{}, {"granularity": "full", "num_layers": 2}], ids=["none", "full"])
def test_a_layer_of_each_kind_stands_for_all(recompute: dict[str, Any]) -> None:
    ((few, few_costs), (every, all_costs)) = spawn(with_and_without_representatives, 1, recompute, timeout=600)[0]
    assert few == pytest.approx(every, rel=1e-3)
    assert few_costs.keys() == all_costs.keys()
    for name, values in all_costs.items():
        assert few_costs[name] == pytest.approx(values, rel=2e-3), name


def stages_of_aquila_vl(layouts: list[str]) -> list[list[StageProfile]]:
    run = recipe("aquila-vl-2b/2a")
    assert run.aquila_vl is not None
    picture = plan_image(640, 480, "image", run.aquila_vl.grid)
    row = PlannedRow((PlannedDocument(60 + picture.tokens, (picture,)),), 64 + picture.tokens)
    found = []
    for layout in layouts:
        parallel = run.parallel.replace(pipeline_model_parallel_size=2, pipeline_model_parallel_layout=layout)
        found.append(profile_run(run.replace(parallel=parallel), 2, 4, {"mean": row, "worst": row}))
    return found


def test_the_tower_may_have_a_chunk_of_its_own() -> None:
    """As the split by cost gives it where pictures are many."""
    layouts = ["E|" + 28 * "t" + "L", "Et|" + 27 * "t" + "L"]
    (((alone, behind), (front, rest)),) = spawn(stages_of_aquila_vl, 1, layouts, timeout=600)
    assert (alone.layers, behind.layers) == (0, 28)
    assert "tower forward" in flops(alone.mean.costs) and "decoder forward" not in flops(alone.mean.costs)
    # One layer less in front is one more behind: what both stages hold and compute stays the same.
    assert alone.parameters + behind.parameters == front.parameters + rest.parameters
    assert flops((*alone.mean.costs, *behind.mean.costs)) == flops((*front.mean.costs, *rest.mean.costs))
    assert 0 < alone.mean.activation_per_microbatch < front.mean.activation_per_microbatch


def alone_and_with_traces_of_others() -> list[tuple[list[StageProfile], list[StageProfile], int]]:
    run, row = infimm("finetune")
    run = run.with_changes([("decoder.num_layers", 16)])
    layouts: list[dict[str, Any]] = [
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 4, "vision_over": "all_stages"},
        {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ]
    traces, found = Traces(), []
    for layout in layouts:
        for granularity in ("none", "full"):
            recompute = run.recompute.replace(granularity=granularity)
            changed = run.replace(parallel=run.parallel.replace(**layout), recompute=recompute)
            before = len(traces.chunks)
            shared = profile_run(changed, 16, 4, {"mean": row, "worst": row}, traces)
            traced = len(traces.chunks) - before
            found.append((profile_run(changed, 16, 4, {"mean": row, "worst": row}), shared, traced))
    return found


def test_traces_of_another_layout_say_what_its_own_would() -> None:
    (found,) = spawn(alone_and_with_traces_of_others, 1, timeout=600)
    for alone, shared, _ in found:
        assert shared == alone
    traced = [number for _, _, number in found]
    assert traced[:2] == [2, 2], "first and last, without and with recompute"
    assert traced[2:6] == [1, 1, 0, 0], "what stands between, of fewer layers; interleaved nothing is new"
    assert all(number > 0 for number in traced[6:]), "towers elsewhere, tensor parallelism"


def hooks_before_and_behind() -> list[bool]:
    run, _ = infimm("pretrain")
    hook, found = sys.excepthook, []
    for rank in range(2):
        with traced_rank(run, 8, 0) if rank else imagined_world(1, 2):
            pass
        found.append(sys.excepthook is hook)
    return found


def test_errors_behind_a_trace_are_told_without_imagined_ranks() -> None:
    assert spawn(hooks_before_and_behind, 1) == [[True, True]]


def row_of(run: RunConfig, words: int, tiles: int) -> PlannedRow:
    """Four documents of equal length, and a picture of one tile in each until there are enough."""
    assert run.aquila_vl is not None
    picture = plan_image(64, 64, "one_of_several", run.aquila_vl.grid)
    assert picture.tiles == 1
    documents = tuple(
        PlannedDocument(words + count * picture.tokens, count * (picture,))
        for count in (tiles // 4 + (number < tiles % 4) for number in range(4))
    )
    return PlannedRow(documents, sum(document.tokens for document in documents))


def guessed_and_traced() -> list[tuple[float, float]]:
    """Seconds of a step of rows of several sizes: from the sizes of three traced ones, and traced themselves."""
    run = recipe("aquila-vl-tiny/2b")
    mean, worst = row_of(run, 100, 8), row_of(run, 110, 16)
    long = _with_more_words(mean, worst.length - mean.length)
    cluster = parse_cluster("1x1xH100")
    three = profile_run(run, 1, 4, {"mean": mean, "worst": worst, "long": long})
    found = []
    for words, tiles in ((150, 4), (60, 12), (200, 8)):
        row = row_of(run, words, tiles)
        drawn = drawn_rows([(row.padded, row.tiles)], 4, 1)
        guessed = step_time(three, cluster, run.parallel, 4, rate, rows=drawn)
        traced = step_time(profile_run(run, 1, 4, {"mean": row, "worst": row}), cluster, run.parallel, 4, rate)
        found.append((guessed.seconds, traced.seconds))
    return found


def test_rows_of_other_sizes_take_what_their_words_and_tiles_say() -> None:
    (found,) = spawn(guessed_and_traced, 1, timeout=600)
    for guessed, traced in found:
        assert guessed == pytest.approx(traced, rel=0.03)
    assert max(traced for _, traced in found) > 1.2 * min(traced for _, traced in found)


def shapes(batch: Any) -> dict[str, Any]:
    tensors = {f"{number}": tuple(tensor.shape) for number, tensor in enumerate(tracing.tensors_of(batch))}
    return {**tensors, "documents": batch.cu_seqlens.tolist(), "tiles": batch.media.tiles}


def planned_and_loaded(root: Path, tokenizer: Path, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of the first step, as planned and as the loader makes them."""
    process_groups.join()
    run = run_on_toys(root, tokenizer, name)
    assert run.data is not None
    groups = process_groups.start(run.parallel, run.train.seed)
    model: Model = tracing.build_rank(run, groups).model
    (step,) = prepared_steps(run, run.data)
    loaded = build_loader(run, model, groups).step(0)
    order = build_loader(run, model, groups).planner.rows_dealt(loaded.plan, 0, 1).tolist()
    planned = [shapes(batch_of(run, step.row(number), own_pictures(model))) for number in order]
    return list(zip(planned, map(shapes, loaded.batches), strict=True))


def run_on_toys(root: Path, tokenizer: Path, name: str) -> RunConfig:
    """One step of a recipe on prepared conversations, some without a picture."""
    chat = ChatConfig()
    run = recipe(name)
    data = data_config(root, tokenizer, chat, [stream(("chat", "multi_image", "text"), 12, over_long="cut")])
    words = Tokenizer(tokenizer)
    ids = {"image_token_id": words.token_of("<image>")}
    if run.infimm is not None:
        run = run.replace(infimm=run.infimm.replace(**ids))
    elif run.aquila_vl is not None:
        run = run.replace(aquila_vl=run.aquila_vl.replace(**ids, video_token_id=words.token_of("<video>")))
    return run.replace(data=data, train=run.train.replace(train_iters=1))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, tokenizer)."""
    root = tmp_path_factory.mktemp("toys")
    tokenizer = Path(write_tokenizer(root / "tokenizer").folder)
    return prepare_toys(root, tokenizer, ChatConfig(), {"chat": 20, "multi_image": 20, "text": 20}), tokenizer


@pytest.mark.parametrize("name", ["infimm-tiny/finetune", "aquila-vl-tiny/2b"])
def test_planned_rows_have_the_shapes_of_the_loaders(toys: tuple[Path, Path], name: str) -> None:
    (pairs,) = spawn(planned_and_loaded, 1, *toys, name)
    assert len(pairs) >= 4
    for planned, loaded in pairs:
        assert planned == loaded


def mfu_planned_and_logged(root: Path, tokenizer: Path, name: str) -> list[tuple[float, float, float]]:
    """(MFU of the plan, that of a log whose steps take as long, share of the peak in seconds) in some layouts."""
    usual = run_on_toys(root, tokenizer, name)
    assert usual.data is not None
    mix, efficiency = mix_of(usual, from_data=True), Calibration.load(CALIBRATION).of("A100-80GB")
    words = build_words(usual)
    plan = Planner(usual.data, open_sources(usual.data, words), words, usual.train.seed).plan(0)
    found = []
    for gpus, tensor, recompute in ((1, 1, "none"), (2, 2, "none"), (2, 1, "full")):
        run = usual.with_changes(
            [("parallel.tensor_model_parallel_size", tensor), ("recompute.granularity", recompute)]
        )
        planned = judge(run, parse_cluster(f"1x{gpus}xA100-80GB"), mix, efficiency)
        logging = run.replace(log=run.log.replace(peak_tflops=312.0))
        report = report_of(1, seconds=planned.seconds, work=work_of_plan(plan))
        logged = Speedometer(logging, groups_of_one(world_size=gpus)).over([report])
        assert logged.mfu is not None
        found.append((planned.mfu, logged.mfu, planned.mfu * planned.seconds * gpus))
    return found


@pytest.mark.parametrize("name", ["infimm-tiny/finetune", "aquila-vl-tiny/2b"])
def test_planned_mfu_is_the_one_that_training_logs(toys: tuple[Path, Path], name: str) -> None:
    (found,) = spawn(mfu_planned_and_logged, 1, *toys, name, timeout=600)
    for planned, logged, _ in found:
        assert planned == pytest.approx(logged, rel=1e-9)
    floors = [floor for *_, floor in found]
    assert floors == pytest.approx([floors[0]] * 3, rel=1e-9)
