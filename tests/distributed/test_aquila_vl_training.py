"""Aquila-VL in training: packing, text alone, stage 1, layouts alike step by step, and no rank ever left waiting."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gathered import gradients
from layouts import every_layout
from safetensors.torch import load_file, save_file
from tiny_aquila import GRIDS, IMAGE, TILE, VIDEO, save_tiny, tiny_config
from torch import Tensor

from megavlm.batch import SplicedMedia, TextBatch
from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import Model, build_model
from megavlm.build.run_config import (
    DataParallelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
)
from megavlm.data.assemble_tables import spliced_batch
from megavlm.infer.cases import Case, case_batches
from megavlm.infer.logits import compute_logits
from megavlm.model.freeze import PARTS_OF_AQUILA_VL
from megavlm.parallel import groups as process_groups
from megavlm.parallel.media_inputs import MediaInputs
from megavlm.parallel.schedule import forward_backward
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.testing import assert_gradients_close, assert_logits_close, assert_losses_close, spawn
from megavlm.tiles import GridConfig, ImagePlan, MediaKind, plan_image
from megavlm.train.optim import build_optimizer
from megavlm.train.step import train_step

TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {**PP2, "virtual_pipeline_model_parallel_size": 2}
STAGE_1 = GridConfig(tile_size=TILE, tiling="single")
STAGE_1_TRAINS = ("projector",)
LENGTH = 256
"""Positions of a row: text, images and padding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(path, tiny_config(GRIDS["2b"]))
    return path


def tiny_run(folder: Path, degrees: dict[str, Any], **changes: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "parallel": ParallelConfig(**degrees),
        "precision": PrecisionConfig(params_dtype="float32"),
        "data_parallel": DataParallelConfig(use_distributed_optimizer=False),
        "make_vocab_size_divisible_by": 2,
    }
    run = run_from_folder(folder).replace(**{**defaults, **changes})
    if run.aquila_vl is None or run.trainable != STAGE_1_TRAINS:
        return run
    return run.replace(aquila_vl=run.aquila_vl.replace(grid=STAGE_1))


Row = tuple[list[int], list[ImagePlan], Tensor]


def random_row(grid: GridConfig, seed: int, shapes: list[tuple[int, int]], length: int = LENGTH) -> Row:
    """Tokens, plans and patches of a sample with images of these sizes, or without any."""
    generator = torch.Generator().manual_seed(seed)
    kind: MediaKind = "image" if len(shapes) == 1 else "one_of_several"
    plans = [plan_image(width, height, kind, grid) for width, height in shapes]
    tokens = torch.randint(0, 100, (5,), generator=generator).tolist()
    for plan in plans:
        tokens += [IMAGE] * plan.tokens + torch.randint(0, 100, (3,), generator=generator).tolist()
    tokens += torch.randint(0, 100, (length - len(tokens),), generator=generator).tolist()
    rows = sum(plan.patch_rows for plan in plans)
    return tokens, plans, torch.randn(rows, 3 * grid.patch_size**2, generator=generator)


def batch_of(rows: list[Row], packed: bool = False) -> TextBatch:
    """The rows one below another, or as documents of one row."""
    tokens = torch.tensor([row[0] for row in rows])
    bounds = None
    if packed:
        bounds = torch.arange(0, tokens.numel() + 1, tokens.size(1), dtype=torch.int32)
        tokens = tokens.view(1, -1)
    is_image = tokens == IMAGE
    targets = tokens.masked_fill(is_image, -100)
    plans = [plan for row in rows for plan in row[1]]
    return spliced_batch(tokens, targets, is_image.numpy(), plans, torch.cat([row[2] for row in rows]), bounds)


SHAPES = [[(150, 120)], [], [(30, 60), (200, 9)]]
"""One image cut into a grid, none, two of one tile."""


def compare_batching(folder: Path, degrees: dict[str, Any]) -> None:
    """Rows alone, rows one below another, and packed: the same logits and gradients."""
    process_groups.join()
    run = tiny_run(folder, degrees)
    assert run.aquila_vl is not None
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    rows = [random_row(run.aquila_vl.grid, seed, shapes) for seed, shapes in enumerate(SHAPES)]
    found = []
    for batches in ([batch_of([row]) for row in rows], [batch_of(rows)], [batch_of(rows, packed=True)]):
        logits = compute_logits(chunks, batches, groups, run.decoder.vocab_size, model.inputs)
        forward_backward(chunks, batches, groups, model.inputs)
        found.append((logits, gradients(chunks, run, groups)))
    (alone, expected), (below, of_below), (packed, of_packed) = found
    assert_gradients_close(of_below, expected, tolerance=1e-5)
    assert_gradients_close(of_packed, expected, tolerance=1e-5)
    if groups.is_last_stage:
        assert_logits_close(below[0], torch.cat(alone), tolerance=1e-5)
        assert_logits_close(packed[0].view_as(below[0]), torch.cat(alone), tolerance=1e-5)


@pytest.mark.parametrize("degrees", [{}, TP2, TP2_SP, PP2], ids=["one process", "TP=2", "TP=2 with SP", "PP=2"])
def test_packed_rows_equal_separate_rows(degrees: dict[str, Any], folder: Path) -> None:
    spawn(compare_batching, ParallelConfig(**degrees).model_parallel_size, folder, degrees)


def compare_held(folder: Path, degrees: dict[str, Any], trainable: Any) -> None:
    """Batches that hold the pixels of this rank's own pictures alone give the gradients of those that hold all."""
    process_groups.join()
    run = tiny_run(folder, degrees, trainable=trainable)
    assert run.aquila_vl is not None
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    grid = run.aquila_vl.grid
    shapes = [[(150, 120)], [(30, 60), (200, 9), (5, 5)], []]
    rows = [random_row(grid, seed, one) for seed, one in enumerate(shapes)]
    batches = [batch_of(rows[:1]), batch_of(rows[1:], packed=True)]
    forward_backward(chunks, batches, groups, model.inputs)
    expected = gradients(chunks, run, groups)
    assert isinstance(model.inputs, MediaInputs)
    own = model.inputs.own_pictures([batch.media.tiles for batch in batches if batch.media])
    counts: list[Any] = [None] * groups.world_size
    torch.distributed.all_gather_object(counts, sum(map(len, own)))
    assert sum(counts) == 4
    forward_backward(chunks, list(map(hold_only, batches, own)), groups, model.inputs)
    assert_gradients_close(gradients(chunks, run, groups), expected, tolerance=1e-5)


def hold_only(batch: TextBatch, own: tuple[int, ...]) -> TextBatch:
    assert batch.media is not None
    pictures = batch.media.patches.split([tiles * (TILE // 14) ** 2 for tiles in batch.media.tiles])
    patches = torch.cat([batch.media.patches[:0], *(pictures[number] for number in own)])
    return replace(batch, media=replace(batch.media, patches=patches, held=own))


@pytest.mark.parametrize(
    "degrees, trainable",
    [
        (TP2, PARTS_OF_AQUILA_VL),
        ({**TP2_SP, **PP2}, PARTS_OF_AQUILA_VL),
        ({**TP2, **PP2, "vision_over": "all_stages"}, ("decoder", "projector", "newline")),
    ],
    ids=["TP=2", "TP=2 x PP=2 with SP", "TP=2 x PP=2, all stages encoding"],
)
def test_ranks_need_the_pixels_of_their_own_pictures_alone(
    degrees: dict[str, Any], trainable: Any, folder: Path
) -> None:
    spawn(compare_held, ParallelConfig(**degrees).model_parallel_size, folder, degrees, trainable)


def plain_decoder_folder(source: Path, target: Path) -> Path:
    """The language model alone, as the folder it would have been made from."""
    prefix = "language_model."
    weights = load_file(source / "model.safetensors")
    target.mkdir()
    save_file(
        {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)},
        target / "model.safetensors",
    )
    tiny_config().text_config.save_pretrained(target)
    return target


def compare_text_only(folder: Path, plain: Path, degrees: dict[str, Any]) -> None:
    process_groups.join()
    tokens = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(1))
    logits = []
    for path in (folder, plain):
        run = tiny_run(path, degrees)
        groups = process_groups.start(run.parallel)
        model = build_model(run, groups)
        batches = case_batches(Case(tokens), run)
        logits.append(compute_logits(model.chunks, batches, groups, run.decoder.vocab_size, model.inputs))
        process_groups.stop()
    for with_eyes, bare in zip(*logits, strict=True):
        assert torch.equal(with_eyes, bare)


@pytest.mark.parametrize("degrees", [{}, TP2_SP, PP2], ids=["one process", "TP=2 with SP", "PP=2"])
def test_text_without_images_is_the_bare_decoder(degrees: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    plain = plain_decoder_folder(folder, tmp_path / "plain")
    spawn(compare_text_only, ParallelConfig(**degrees).model_parallel_size, folder, plain, degrees)


def train_stage_1(folder: Path, degrees: dict[str, Any]) -> None:
    """The projector alone learns; full recompute, which loses gradients behind inputs that need none."""
    process_groups.join()
    full = RecomputeConfig(granularity="full")
    run = tiny_run(folder, degrees, optimizer=OptimizerConfig(lr=1e-2), recompute=full, trainable=STAGE_1_TRAINS)
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, scheduler = build_optimizer(chunks, run)
    before = {name: tensor.clone() for name, tensor, _ in state_of(model)}
    for step in range(20):
        batches = [batch_of([random_row(STAGE_1, step, [(40, 60)])]), batch_of([random_row(STAGE_1, -step - 1, [])])]
        train_step(chunks, optimizer, batches, groups, model.inputs)
        scheduler.step(increment=1)
    for name, after, learns in state_of(model):
        assert learns == name.startswith("projector."), name
        assert torch.equal(before[name], after) != learns, f"{name}: trained {learns}"
    learning = sum(p.numel() for chunk in model.chunks for p in chunk.parameters() if p.requires_grad)
    assert sum(buffer.numel_unpadded for chunk in chunks for buffer in chunk.buffers) == learning
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == learning


def state_of(model: Model) -> list[tuple[str, Tensor, bool]]:
    return [(n, p.detach(), p.requires_grad) for part in model.parts() for n, p in part.named_parameters()]


@pytest.mark.parametrize(
    "degrees",
    [{}, TP2_SP, PP2, {**PP2, "vision_over": "all_stages"}],
    ids=["one process", "TP=2 with SP", "PP=2", "PP=2, all stages encoding"],
)
def test_stage_1_trains_the_projector_alone(degrees: dict[str, Any], folder: Path) -> None:
    spawn(train_stage_1, ParallelConfig(**degrees).model_parallel_size, folder, degrees)


def losses_of(folder: Path, degrees: dict[str, Any], changes: dict[str, Any], steps: int = 10) -> list[Any]:
    """(loss, gradient norm) of each step, on the ranks that know the loss; four rows a step."""
    process_groups.join()
    run = tiny_run(folder, degrees, optimizer=OptimizerConfig(lr=1e-3, lr_warmup_iters=0), **changes)
    assert run.aquila_vl is not None
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, scheduler = build_optimizer(chunks, run)
    scheduler.step(increment=1)
    found = []
    for step in range(steps):
        rows = [
            random_row(run.aquila_vl.grid, 10 * step + n, shapes) for n, shapes in enumerate([*SHAPES, [(90, 300)]])
        ]
        batches = [batch_of([row]) for row in rows[groups.data_rank :: groups.data_size]]
        result = train_step(chunks, optimizer, batches, groups, model.inputs)
        scheduler.step(increment=1)
        found.append((result.loss, result.grad_norm))
    return found if groups.speaks else []


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP=2 with SP": (2, TP2_SP),
    "PP=2": (2, PP2),
    "interleaved PP=2": (2, INTERLEAVED),
    "DP=2 x TP=2": (4, TP2),
    "TP=2 x PP=2 with SP": (4, {**TP2_SP, **PP2}),
}


def assert_same_training(folder: Path, world_size: int, degrees: dict[str, Any], changes: dict[str, Any]) -> None:
    (expected,) = spawn(losses_of, 1, folder, {}, changes)
    assert expected[-1][0] < expected[0][0], "nothing was learned"
    (found,) = filter(None, spawn(losses_of, world_size, folder, degrees, changes))
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert_losses_close(loss, expected_loss)
        assert_losses_close(norm, expected_norm, tolerance=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_are_alike(layout: str, folder: Path) -> None:
    overlapped = DataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    assert_same_training(folder, *LAYOUTS[layout], {"data_parallel": overlapped})


def test_ten_steps_of_stage_1_are_alike(folder: Path) -> None:
    assert_same_training(folder, 4, {**TP2, **PP2, "vision_over": "all_stages"}, {"trainable": STAGE_1_TRAINS})


def test_a_recomputed_tower_trains_alike(folder: Path) -> None:
    recompute = RecomputeConfig(granularity="full", vision_tower=True)
    assert spawn(losses_of, 1, folder, {}, {"recompute": recompute}, 3) == spawn(losses_of, 1, folder, {}, {}, 3)


@pytest.mark.full
@pytest.mark.parametrize("layout", every_layout(), ids=lambda layout: layout[0])
def test_ten_steps_are_alike_in_every_layout(layout: tuple[str, int, dict[str, Any]], folder: Path) -> None:
    _, world_size, degrees = layout
    assert_same_training(folder, world_size, degrees, {})


def train_on_scattered_images(folder: Path, degrees: dict[str, Any], steps: int) -> None:
    """Images in few microbatches only, differently on each data-parallel rank."""
    process_groups.join()
    run = tiny_run(folder, degrees, data_parallel=DataParallelConfig(overlap_grad_reduce=True))
    assert run.aquila_vl is not None
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, _ = build_optimizer(chunks, run)
    draw = random.Random(groups.data_rank)
    for step in range(steps):
        shapes = [draw.choice([[], [], [], [(60, 40)], [(9, 9), (9, 9)]]) for _ in range(2)]
        batches = [batch_of([random_row(run.aquila_vl.grid, step, one)]) for one in shapes]
        assert train_step(chunks, optimizer, batches, groups, model.inputs).applied


@pytest.mark.parametrize(
    "world_size, degrees", [(2, {}), (2, TP2_SP), (4, {**TP2, **PP2})], ids=["DP=2", "TP=2 with SP", "TP=2 x PP=2"]
)
def test_no_rank_waits_in_60_steps_with_scattered_images(
    world_size: int, degrees: dict[str, Any], folder: Path
) -> None:
    spawn(train_on_scattered_images, world_size, folder, degrees, 60, timeout=300)


def test_a_batch_says_how_its_images_lie() -> None:
    """The patches are counted in tiles, and a place of two rows holds both, one behind the other."""
    batch = batch_of([random_row(GRIDS["2a"], 0, [(10, 10)]), random_row(GRIDS["2a"], 1, [])])
    assert isinstance(batch.media, SplicedMedia) and batch.media.images == 2
    assert VIDEO not in batch.tokens and batch.media.table.index.shape[0] == 2 * LENGTH
    assert batch.media.table.index[:4, 0].tolist() == [0, 1, 2, 3]
    # Row 0 has its image from place 5 on; row 1 goes on with its own text.
    assert batch.media.table.index[10:12, 0].tolist() == [2 * LENGTH, 11]
