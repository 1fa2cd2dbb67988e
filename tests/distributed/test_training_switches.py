"""Switches that must not change the numbers: recompute, overlap, the distributed optimizer; and bf16, which may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megavlm.build.model import build_model
from megavlm.build.run_config import (
    DataParallelConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)
from megavlm.data.toy_text import toy_step
from megavlm.parallel import groups as process_groups
from megavlm.parallel.schedule import forward_backward
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.recipes import recipe
from megavlm.testing import assert_losses_close, spawn
from megavlm.train.loop import train
from megavlm.train.optim import build_optimizer
from megavlm.train.step import train_step

LENGTH, ROWS = 16, 4
TP2_SEQUENCE_PARALLEL = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)

RECOMPUTE = {
    "core attention": RecomputeConfig(granularity="selective", modules=("core_attn",)),
    "mlp": RecomputeConfig(granularity="selective", modules=("mlp",)),
    "layernorm": RecomputeConfig(granularity="selective", modules=("layernorm",)),
    "full uniform": RecomputeConfig(granularity="full", method="uniform", num_layers=1),
    "full block": RecomputeConfig(granularity="full", method="block", num_layers=2),
}


def small_run(**changes: Any) -> RunConfig:
    base = recipe("decoder-tiny")
    train = TrainConfig(global_batch_size=ROWS, micro_batch_size=2, seq_length=LENGTH, train_iters=10)
    return base.replace(**{"train": train, **changes})


def batches_of(run: RunConfig, step: int, groups: process_groups.Groups) -> list[Any]:
    return toy_step(
        seed=1,
        step=step,
        global_batch_size=ROWS,
        micro_batch_size=run.train.micro_batch_size,
        seq_length=LENGTH,
        vocab_size=run.decoder.vocab_size,
        data_rank=groups.data_rank,
        data_size=groups.data_size,
    )


def gradients(run: RunConfig) -> dict[str, Tensor]:
    groups = process_groups.start(run.parallel, seed=5)
    chunks = wrap_data_parallel(list(build_model(run, groups).chunks), run.data_parallel)
    forward_backward(chunks, batches_of(run, 0, groups), groups)
    process_groups.stop()
    return {name: parameter.main_grad.clone() for chunk in chunks for name, parameter in chunk.named_parameters()}


def compare_recompute(parallel: ParallelConfig, dropout: float) -> None:
    process_groups.join()
    decoder = recipe("decoder-tiny").decoder.replace(hidden_dropout=dropout, attention_dropout=0.0)
    plain = gradients(small_run(parallel=parallel, decoder=decoder))
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for what, recompute in RECOMPUTE.items():
        again = gradients(small_run(parallel=parallel, decoder=decoder, recompute=recompute))
        for name, gradient in plain.items():
            message = f"recompute of {what} changes the gradient of {name}"
            if what == "layernorm":  # its backward adds the residual's gradient in another order
                assert (again[name] - gradient).norm() <= 1e-6 * gradient.norm(), message
            else:
                assert torch.equal(again[name], gradient), message


def steps_of(run: RunConfig) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each step."""
    groups = process_groups.start(run.parallel)
    chunks = wrap_data_parallel(list(build_model(run, groups).chunks), run.data_parallel)
    optimizer, scheduler = build_optimizer(chunks, run)
    found = []
    for step in range(10):
        result = train_step(chunks, optimizer, batches_of(run, step, groups), groups)
        found.append((result.loss, result.grad_norm))
        scheduler.step(increment=1)
    process_groups.stop()
    return found


def compare_data_parallel() -> None:
    process_groups.join()
    plain = steps_of(small_run(data_parallel=DataParallelConfig(use_distributed_optimizer=False)))
    assert plain[-1][0] < plain[0][0]
    overlapped = DataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    for what, data_parallel in {"distributed optimizer": DataParallelConfig(), "overlap": overlapped}.items():
        other = steps_of(small_run(data_parallel=data_parallel))
        for step, pair in enumerate(zip(other, plain, strict=True)):
            # The norm too: Adam hides a gradient that is a multiple of what it should be.
            for mine, theirs in zip(*pair, strict=True):
                assert abs(mine - theirs) <= 1e-5 * abs(theirs), f"{what}, step {step}: {mine} against {theirs}"


def compare_bf16() -> None:
    process_groups.join()
    exact = steps_of(small_run(parallel=TP2_SEQUENCE_PARALLEL))
    run = small_run(parallel=TP2_SEQUENCE_PARALLEL, precision=PrecisionConfig(params_dtype="bfloat16"))
    rounded = steps_of(run)
    for (mine, _), (theirs, _) in zip(rounded, exact, strict=True):
        assert_losses_close(mine, theirs, tolerance=2e-2)
    groups = process_groups.start(run.parallel)
    chunks = wrap_data_parallel(list(build_model(run, groups).chunks), run.data_parallel)
    optimizer, _ = build_optimizer(chunks, run)
    assert {p.dtype for chunk in chunks for p in chunk.parameters()} == {torch.bfloat16}
    assert {p.main_grad.dtype for chunk in chunks for p in chunk.parameters()} == {torch.float32}
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {torch.float32}
    process_groups.stop()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("parallel", [ParallelConfig(), TP2_SEQUENCE_PARALLEL], ids=["one process", "TP=2 with SP"])
def test_recompute_changes_nothing(parallel: ParallelConfig, dropout: float) -> None:
    spawn(compare_recompute, parallel.model_parallel_size, parallel, dropout)


def test_ways_of_data_parallelism_agree() -> None:
    spawn(compare_data_parallel, 2)


def test_bf16_follows_float32_with_masters_in_float32() -> None:
    spawn(compare_bf16, 2)


def weights_after_training(run: RunConfig) -> dict[str, Tensor]:
    """What the loop hands to the exporter."""
    groups = process_groups.start(run.parallel)
    model = train(run, groups).model
    process_groups.stop()
    return {name: parameter.detach().clone() for part in model.parts() for name, parameter in part.named_parameters()}


def compare_trained_weights() -> None:
    process_groups.join()
    plain = weights_after_training(small_run())
    overlapped = DataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    for name, weight in weights_after_training(small_run(data_parallel=overlapped)).items():
        assert torch.equal(weight, plain[name]), f"{name} lacks the last step"


def test_overlapped_gather_is_complete_when_training_ends() -> None:
    spawn(compare_trained_weights, 2)


def dropped_numbers() -> tuple[list[float], list[float]]:
    """Of this rank's two generators: the shared one, and the one of its tensor-parallel slice."""
    process_groups.join()
    process_groups.start(ParallelConfig(tensor_model_parallel_size=2), seed=5)
    shared = torch.rand(3).tolist()
    with get_cuda_rng_tracker().fork():
        return shared, torch.rand(3).tolist()


def test_only_tensor_parallel_ranks_share_what_they_drop() -> None:
    ranks = spawn(dropped_numbers, 4)
    (first, second), (third, fourth) = ranks[:2], ranks[2:]
    assert first[0] == second[0]
    assert third[0] == fourth[0]
    assert first[0] != third[0]
    assert len({tuple(own) for _, own in ranks}) == 4
