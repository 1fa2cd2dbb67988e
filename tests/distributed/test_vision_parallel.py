"""Images dealt over model-parallel ranks: features, gradients and updates are those of one process, and none waits."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from vision_cases import CASES, TOWER, DealtVision, loss_of_one_process, patches_of, projection, vision

from megavlm.model.towers import mark_vision_parallel
from megavlm.parallel import groups as process_groups
from megavlm.parallel import vision_parallel
from megavlm.parallel.layout import ParallelConfig
from megavlm.parallel.vision_parallel import (
    Deal,
    deal_images,
    encode_ahead,
    gather_images,
    rows_of_images,
    sum_over_ranks,
)
from megavlm.parallel.wrap import DataParallelConfig, OptimizerConfig, make_optimizer, wrap_data_parallel
from megavlm.testing import assert_gradients_close, spawn

WHOLE_GRADIENTS = DataParallelConfig(use_distributed_optimizer=False)


# --- the deal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_a_deal_is_whole_and_balanced(seed: int) -> None:
    draw = random.Random(seed)
    ranks, costs = (
        draw.randint(1, 9),
        [draw.choice([0.0, 1.0, draw.uniform(0, 30)]) for _ in range(draw.randint(0, 40))],
    )
    deal = deal_images(costs, ranks)
    assert len(deal) == ranks
    assert sorted(image for images in deal for image in images) == list(range(len(costs)))
    assert all(images == sorted(images) for images in deal)
    loads = [sum(costs[image] for image in images) for images in deal]
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0) + 1e-9
    random.seed(seed)  # nothing outside the arguments counts
    assert deal_images(list(costs), ranks) == deal


@pytest.mark.parametrize("cost", [0.0, 0.1, 576.0])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [0, 1, 7, 16, 41])
def test_images_of_equal_cost_are_dealt_evenly(cost: float, ranks: int, images: int) -> None:
    counts = [len(own) for own in deal_images([cost] * images, ranks)]
    assert max(counts) - min(counts) <= 1


def test_the_costliest_come_first_and_ties_go_by_number() -> None:
    assert deal_images([1, 5, 1, 2, 1], 2) == [[1], [0, 2, 3, 4]]
    assert deal_images([2, 2, 2], 2) == [[0, 2], [1]]


# --- features and their gradients --------------------------------------------------------------------------------


def deals(ranks: int) -> dict[str, Deal]:
    last_only: Deal = [[] for _ in range(ranks)]
    last_only[-1] = [0, 1, 2, 3]
    return {
        "one rank only": last_only,
        "no rank": [[] for _ in range(ranks)],
        "random": deal_images([3, 1, 1, 7, 1, 1, 1], ranks),
        "out of order": [[1, 4], [0, 2, 3], *([] for _ in range(ranks - 2))],
    }


def compare_gather() -> None:
    process_groups.join()
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    for deal in deals(ranks).values():
        total = sum(map(len, deal))
        for shape in ((), (3,), (2, 5)):
            for dtype in (torch.float32, torch.bfloat16):
                numbers = torch.arange(total * torch.Size(shape).numel()) % 11  # all sums of them exact in bfloat16
                images = numbers.reshape(total, *shape).to(dtype)
                for gradient, sum_of in (("replicated", 1), ("partial", ranks * (ranks + 1) // 2)):
                    mine = images[deal[rank]].requires_grad_()
                    gathered = gather_images(mine, deal, group, gradient)  # type: ignore[arg-type]
                    assert gathered.dtype == dtype and torch.equal(gathered, images)
                    share = 1 if gradient == "replicated" else rank + 1
                    gathered.backward(images * share)
                    assert mine.grad is not None and torch.equal(mine.grad, images[deal[rank]] * sum_of)


@pytest.mark.parametrize("ranks", [2, 4])
def test_images_are_gathered_in_order_and_gradients_return_to_their_owner(ranks: int) -> None:
    spawn(compare_gather, ranks)


def gradients_of_one_process(case: str, images: int, seed: int) -> dict[str, Tensor]:
    model, weight = vision(), projection().requires_grad_()
    loss_of_one_process(case, model, weight, images, seed).backward()
    found = {f"vision.{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {**found, "projection.weight": weight.grad}  # type: ignore[dict-item]


def compare_gradients() -> None:
    world = process_groups.join()
    groups = process_groups.start(ParallelConfig(tensor_model_parallel_size=world))
    for case in CASES:
        model = DealtVision(case, groups)
        (wrapped,) = wrap_data_parallel([model], WHOLE_GRADIENTS)
        for what, deal in deals(world).items():
            wrapped.zero_grad_buffer()
            wrapped(deal, seed=7).backward()
            model.config.finalize_model_grads_func([wrapped], pg_collection=groups.collection)
            mine = {name: p.main_grad for name, p in model.named_parameters() if p.requires_grad}
            expected = gradients_of_one_process(case, sum(map(len, deal)), seed=7)
            if "projection.weight" in mine:
                expected["projection.weight"] = model.own_columns(expected["projection.weight"].T).T
            else:
                del expected["projection.weight"]
            if what == "no rank":
                assert mine.keys() == expected.keys()
                assert not any(gradient.any() for gradient in mine.values())
                continue
            try:
                assert_gradients_close(mine, expected, tolerance=1e-5)
            except AssertionError as error:
                raise AssertionError(f"{case}, images on {what}: {error}") from error
    process_groups.stop()


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_one_process_wherever_the_images_are(ranks: int) -> None:
    spawn(compare_gradients, ranks)


# --- what the ranks do with them ---------------------------------------------------------------------------------


def compare_sums() -> None:
    process_groups.join()
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    vision_parallel._NUMBERS_PER_MESSAGE = 7  # several messages, one of them a single gradient that fills it
    parameters = [nn.Parameter(torch.zeros(size)) for size in (2, 3, 9, 1, 4, 2)]
    mark_vision_parallel(nn.ParameterList(parameters[1:]))
    for number, parameter in enumerate(parameters):
        dtype = torch.bfloat16 if number == 4 else torch.float32
        parameter.main_grad = torch.full(parameter.shape, rank + number, dtype=dtype)  # type: ignore[attr-defined]
    parameters.append(nn.Parameter(torch.zeros(3), requires_grad=False))  # frozen: marked and without a gradient
    mark_vision_parallel(nn.ParameterList(parameters[-1:]))
    sum_over_ranks(parameters, group)
    found = [parameter.main_grad for parameter in parameters[:-1]]  # type: ignore[attr-defined]
    assert found[0].eq(rank).all(), "not marked"
    for number, gradient in enumerate(found[1:], start=1):
        assert gradient.eq(ranks * number + ranks * (ranks - 1) // 2).all(), number
    parameters[1].sequence_parallel = True  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="both vision_parallel and sequence_parallel"):
        sum_over_ranks(parameters, group)


@pytest.mark.parametrize("ranks", [2, 4])
def test_marked_gradients_are_summed_and_no_others(ranks: int) -> None:
    spawn(compare_sums, ranks)


def compare_update(overlap: bool) -> None:
    """TP=2 x DP=2: each data-parallel rank has images of its own, the second none on its first rank."""
    process_groups.join()
    groups = process_groups.start(ParallelConfig(tensor_model_parallel_size=2))
    data_parallel = DataParallelConfig(overlap_grad_reduce=overlap)
    model = DealtVision("own slice", groups)
    (wrapped,) = wrap_data_parallel([model], data_parallel)
    # With so large an epsilon Adam's first update still shows how long the gradient is: lr * g / (|g| + 1).
    settings = OptimizerConfig(lr=0.5, weight_decay=0.0, adam_eps=1.0, clip_grad=1e9)
    optimizer = make_optimizer([wrapped], settings, data_parallel, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    split: list[Deal] = [[[0, 2], [1]], [[], [0, 1]]]
    wrapped.zero_grad_buffer()
    wrapped(split[groups.data_rank], seed=groups.data_rank).backward()
    model.config.finalize_model_grads_func([wrapped], pg_collection=groups.collection)
    _, grad_norm, _ = optimizer.step()
    parts = [gradients_of_one_process("own slice", images, seed) for images, seed in ((3, 0), (2, 1))]
    expected = {name: parts[0][name] + parts[1][name] for name in before}
    updates = {name: (before[name] - model.get_parameter(name).detach()) / 0.5 for name in before}
    assert_gradients_close(updates, {name: g / (g.abs() + 1) for name, g in expected.items()}, tolerance=1e-5)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_distributed_optimizer_takes_the_sum_of_all_ranks(overlap: bool) -> None:
    spawn(compare_update, 4, overlap)


def images_of_step(step: int, data_rank: int, ranks: int) -> Deal:
    """No image in a third of the steps, on a single rank in another."""
    draw = random.Random(100 * step + data_rank)
    costs = [draw.random() for _ in range(draw.randint(1, 3))]
    lone: Deal = [[] for _ in range(ranks)]
    lone[draw.randrange(ranks)] = list(range(len(costs)))
    return draw.choice([[[] for _ in range(ranks)], lone, deal_images(costs, ranks)])


def train_200_steps(tensor_parallel: int) -> None:
    process_groups.join()
    groups = process_groups.start(ParallelConfig(tensor_model_parallel_size=tensor_parallel))
    data_parallel = DataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    model = DealtVision("replicated", groups)
    (wrapped,) = wrap_data_parallel([model], data_parallel)
    optimizer = make_optimizer([wrapped], OptimizerConfig(lr=1e-3, weight_decay=0.0), data_parallel, torch.float32)
    began = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    for step in range(200):
        model.case = ("replicated", "own slice")[step % 2]
        wrapped.zero_grad_buffer()
        wrapped(images_of_step(step, groups.data_rank, tensor_parallel), seed=step).backward()
        model.config.finalize_model_grads_func([wrapped], pg_collection=groups.collection)
        optimizer.step()
    wrapped.start_param_sync(force_sync=True)
    ended = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    everywhere = [torch.empty_like(ended) for _ in range(groups.world_size)]
    dist.all_gather(everywhere, ended)
    assert all(torch.equal(other, ended) for other in everywhere), "ranks have drifted apart"
    assert ended.isfinite().all() and not torch.equal(ended, began)


@pytest.mark.parametrize("ranks, tensor_parallel", [(2, 2), (4, 4), (4, 2)])
def test_200_steps_with_images_on_random_ranks_only(ranks: int, tensor_parallel: int) -> None:
    spawn(train_200_steps, ranks, tensor_parallel)


def compare_encode_ahead() -> None:
    process_groups.join()
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    groups = process_groups.start(layout)
    group, keep = groups.collection.mp, groups.pipeline_rank == 0
    tower = vision().requires_grad_(False)
    for images_in in ([3, 0, 1, 4], [0, 0], [1]):
        images = sum(images_in)
        patches = patches_of(images, seed=5)
        expected = tower(patches).split(images_in)
        for deal in (deal_images([1.0] * images, 4), [[], [], list(range(images)), []]):
            own = rows_of_images(patches, TOWER.patches, deal[group.rank()])
            for at_once in (1, 32):
                found = encode_ahead(tower, own, TOWER.patches, deal, group, images_in, keep, at_once)
                assert len(found) == (len(images_in) if keep else 0)
                for mine, wanted in zip(found, expected, strict=keep):
                    assert not mine.requires_grad
                    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_a_frozen_tower_encodes_ahead_on_all_model_parallel_ranks() -> None:
    spawn(compare_encode_ahead, 4)
