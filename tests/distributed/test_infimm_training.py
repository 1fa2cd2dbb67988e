"""InfiMM in training: packing, text without images, frozen parts, and no rank ever left waiting."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gathered import gradients
from resumed_runs import infimm_row
from safetensors.torch import load_file, save_file
from torch import Tensor

from megavlm.batch import AttendedMedia, TextBatch
from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import Model, build_model
from megavlm.build.run_config import (
    DataParallelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    WeightsConfig,
)
from megavlm.export.hf_export import export_model
from megavlm.infer.cases import Case, case_batches, read_cases
from megavlm.infer.logits import compute_logits
from megavlm.infer.verify import verify
from megavlm.parallel import groups as process_groups
from megavlm.parallel.schedule import forward_backward
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.testing import assert_gradients_close, assert_logits_close, spawn
from megavlm.train.optim import build_optimizer
from megavlm.train.step import train_step

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
FROZEN_DECODER = ("cross_attention", "resampler")


def golden_run(degrees: dict[str, Any], **changes: Any) -> RunConfig:
    run = run_from_folder(GOLDEN).replace(
        parallel=ParallelConfig(**degrees),
        precision=PrecisionConfig(params_dtype="float32"),
        data_parallel=DataParallelConfig(use_distributed_optimizer=False),
        make_vocab_size_divisible_by=2,
    )
    return run.replace(**changes)


def pack(rows: list[TextBatch]) -> TextBatch:
    """The rows as documents of one row, their images behind one another."""
    bounds = torch.tensor([0, *(row.tokens.size(1) for row in rows)]).cumsum(0).int()
    before, images = 0, []
    for row in rows:
        assert isinstance(row.media, AttendedMedia)
        images.append(torch.where(row.media.image_of_token >= 0, row.media.image_of_token + before, -1))
        before += row.media.images
    media = AttendedMedia(
        torch.cat([row.media.patches for row in rows if row.media]),
        (1,) * before,
        image_of_token=torch.cat(images, dim=1),
        has_image=torch.cat([row.media.has_image for row in rows if isinstance(row.media, AttendedMedia)], dim=1),
    )

    def joined(what: str) -> Tensor:
        return torch.cat([getattr(row, what) for row in rows], dim=1)

    return TextBatch(joined("tokens"), joined("labels"), joined("loss_weights"), bounds, media)


def compare_packed(degrees: dict[str, Any]) -> None:
    process_groups.join()
    run = golden_run(degrees)
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    case = read_cases(GOLDEN / "cases.safetensors")["one_sample_without_image"]
    rows = case_batches(case, run)[: case.input_ids.size(0)]
    assert [row.media.images for row in rows if row.media] == [1, 0, 2]
    packed = pack(rows)
    alone = compute_logits(chunks, rows, groups, run.decoder.vocab_size, model.inputs)
    together = compute_logits(chunks, [packed], groups, run.decoder.vocab_size, model.inputs)
    if groups.is_last_stage:
        assert_logits_close(together[0], torch.cat(alone, dim=1), tolerance=1e-5)
    forward_backward(chunks, rows, groups, model.inputs)
    expected = gradients(chunks, run, groups)
    forward_backward(chunks, [packed], groups, model.inputs)
    assert_gradients_close(gradients(chunks, run, groups), expected, tolerance=1e-5)


@pytest.mark.parametrize("degrees", [{}, TP2, TP2_SP, PP2], ids=["one process", "TP=2", "TP=2 with SP", "PP=2"])
def test_packed_rows_equal_separate_rows(degrees: dict[str, Any]) -> None:
    spawn(compare_packed, ParallelConfig(**degrees).model_parallel_size, degrees)


def plain_decoder_folder(folder: Path) -> Path:
    """The golden model's language model alone, as the folder it would have been made from."""
    run = run_from_folder(GOLDEN)
    prefix = "model.lang_encoder."
    weights = {
        name.removeprefix(prefix).replace(".decoder_layer.", "."): tensor
        for name, tensor in load_file(GOLDEN / "model.safetensors").items()
        if name.startswith(prefix) and "gated_cross_attn_layer" not in name
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")

    (folder / "config.json").write_text(json.dumps(run.decoder.to_hf("float32")))
    return folder


def compare_text_only(degrees: dict[str, Any], plain: Path) -> None:
    process_groups.join()
    tokens = torch.randint(3, 120, (2, 16), generator=torch.Generator().manual_seed(1))
    logits = []
    for run in (golden_run(degrees), run_from_folder(plain).replace(**unlike_defaults(degrees))):
        groups = process_groups.start(run.parallel)
        model = build_model(run, groups)
        batches = case_batches(Case(tokens), run)
        logits.append(compute_logits(model.chunks, batches, groups, run.decoder.vocab_size, model.inputs))
        process_groups.stop()
    for with_eyes, bare in zip(*logits, strict=True):
        assert torch.equal(with_eyes, bare)


def unlike_defaults(degrees: dict[str, Any]) -> dict[str, Any]:
    run = golden_run(degrees)
    names = ("parallel", "precision", "make_vocab_size_divisible_by")
    return {name: getattr(run, name) for name in names}


@pytest.mark.parametrize("degrees", [{}, TP2_SP, PP2], ids=["one process", "TP=2 with SP", "PP=2"])
def test_text_without_images_is_the_bare_decoder(degrees: dict[str, Any], tmp_path: Path) -> None:
    plain = plain_decoder_folder(tmp_path / "plain")
    spawn(compare_text_only, ParallelConfig(**degrees).model_parallel_size, degrees, plain)


def train_frozen(degrees: dict[str, Any]) -> None:
    process_groups.join()
    run = golden_run(degrees, trainable=FROZEN_DECODER, optimizer=OptimizerConfig(lr=1e-2))
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    cases = read_cases(GOLDEN / "cases.safetensors")
    case = cases["training_step"]
    case.gradients = {n: g for n, g in case.gradients.items() if "gated_cross_attn" in n or ".perceiver." in n}
    deviations = verify(model, run, groups, {"training_step": case})
    assert len(deviations) == 2 + len(case.gradients)
    assert all(deviation.is_fine for deviation in deviations)

    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, scheduler = build_optimizer(chunks, run)
    before = copies_of(model)
    for _ in range(20):
        train_step(chunks, optimizer, case_batches(case, run), groups, model.inputs)
        scheduler.step(increment=1)
    for name, (old, new, trained) in {n: (before[n], t, trained) for n, t, trained in state_of(model)}.items():
        assert torch.equal(old, new) != trained, f"{name}: trained {trained}"
    learning = sum(p.numel() for chunk in model.chunks for p in chunk.parameters() if p.requires_grad)
    assert sum(buffer.numel_unpadded for chunk in chunks for buffer in chunk.buffers) == learning
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == learning


def state_of(model: Model) -> list[tuple[str, Tensor, bool]]:
    return [(n, p.detach(), p.requires_grad) for part in model.parts() for n, p in part.named_parameters()]


def copies_of(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor, _ in state_of(model)}


@pytest.mark.parametrize("degrees", [{}, TP2_SP, PP2], ids=["one process", "TP=2 with SP", "PP=2"])
def test_frozen_parts_keep_their_bytes_and_cost_no_memory(degrees: dict[str, Any]) -> None:
    spawn(train_frozen, ParallelConfig(**degrees).model_parallel_size, degrees)


def train_on_scattered_images(degrees: dict[str, Any], steps: int) -> None:
    """Images in few microbatches only, differently on each data-parallel rank."""
    process_groups.join()
    run = golden_run(degrees, data_parallel=DataParallelConfig(overlap_grad_reduce=True), trainable=FROZEN_DECODER)
    assert run.infimm is not None
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, _ = build_optimizer(chunks, run)
    draw = random.Random(groups.data_rank)
    for step in range(steps):
        batches = [infimm_row(run, draw.choice([0, 0, 0, 1, 2]), 1000 * step + n) for n in range(2)]
        result = train_step(chunks, optimizer, batches, groups, model.inputs)
        assert result.applied


@pytest.mark.parametrize(
    "world_size, degrees", [(2, {}), (2, TP2_SP), (4, {**TP2, **PP2})], ids=["DP=2", "TP=2 with SP", "TP=2 x PP=2"]
)
@pytest.mark.parametrize("steps", [60, pytest.param(200, marks=pytest.mark.full)])
def test_no_rank_waits_in_steps_with_scattered_images(steps: int, world_size: int, degrees: dict[str, Any]) -> None:
    spawn(train_on_scattered_images, world_size, degrees, steps, timeout=300)


def train_new_tokens(degrees: dict[str, Any], out: Path) -> None:
    process_groups.join()
    run = golden_run(degrees, trainable=(*FROZEN_DECODER, "new_tokens"), optimizer=OptimizerConfig(lr=1e-2))
    assert run.infimm is not None
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    case = read_cases(GOLDEN / "cases.safetensors")["training_step"]
    theirs = case.gradients
    case.gradients = {n: g for n, g in theirs.items() if "gated_cross_attn" in n or ".perceiver." in n}
    assert all(deviation.is_fine for deviation in verify(model, run, groups, {"training_step": case}))

    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    forward_backward(chunks, case_batches(case, run), groups, model.inputs)
    new = [run.infimm.eoc_token_id, run.infimm.image_token_id]
    for chunk in model.chunks:
        for part, name in (("new_input", "model.embed_tokens.weight"), ("new_output", "lm_head.weight")):
            rows = getattr(chunk, part)
            if rows is not None:
                expected = theirs[f"model.lang_encoder.{name}"][new]
                assert_gradients_close({name: rows.rows.main_grad}, {name: expected})

    optimizer, _ = build_optimizer(chunks, run)
    for _ in range(3):
        train_step(chunks, optimizer, case_batches(case, run), groups, model.inputs)
    trained = compute_logits(model.chunks, case_batches(case, run), groups, run.decoder.vocab_size, model.inputs)
    export_model(model, run, groups, out)
    process_groups.stop()
    again = golden_run(degrees).replace(weights=WeightsConfig(load_hf=str(out)))
    groups = process_groups.start(again.parallel)
    model = build_model(again, groups)
    merged = compute_logits(model.chunks, case_batches(case, again), groups, again.decoder.vocab_size, model.inputs)
    for mine, from_folder in zip(trained, merged, strict=True):
        assert_logits_close(mine, from_folder, tolerance=1e-5)


@pytest.mark.parametrize("degrees", [{}, TP2, TP2_SP, PP2], ids=["one process", "TP=2", "TP=2 with SP", "PP=2"])
def test_rows_of_the_new_tokens_learn_in_a_frozen_vocabulary(degrees: dict[str, Any], tmp_path: Path) -> None:
    world_size = ParallelConfig(**degrees).model_parallel_size
    spawn(train_new_tokens, world_size, degrees, tmp_path / "hf")
    golden, trained = tensors_of(GOLDEN), tensors_of(tmp_path / "hf")
    for name in ("model.lang_encoder.model.embed_tokens.weight", "model.lang_encoder.lm_head.weight"):
        changed = (golden[name] != trained[name]).any(dim=1).nonzero().flatten().tolist()
        assert changed == [126, 127], name


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def losses_of_new_tokens(degrees: dict[str, Any], data_parallel: DataParallelConfig) -> list[float]:
    """Of three steps, on the last stage; each data-parallel rank gets its part of the same four rows."""
    process_groups.join()
    run = golden_run(degrees, trainable=("new_tokens",), optimizer=OptimizerConfig(lr=1e-2))
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), data_parallel)
    optimizer, _ = build_optimizer(chunks, run.replace(data_parallel=data_parallel))
    optimizer.param_groups[0]["lr"] = run.optimizer.lr
    rows = range(groups.data_rank, 4, groups.data_size)
    batches = [infimm_row(run, 1, row) for row in rows]
    losses = [train_step(chunks, optimizer, batches, groups, model.inputs).loss for _ in range(3)]
    return losses if groups.is_last_stage else []


def test_new_tokens_wait_for_an_overlapped_gather() -> None:
    """The last stage holds no other trainable parameter whose module could wait for them."""
    overlapped = DataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    (expected,) = spawn(losses_of_new_tokens, 1, {}, DataParallelConfig())
    assert expected[2] < expected[0]
    for losses in filter(None, spawn(losses_of_new_tokens, 4, PP2, overlapped)):
        assert losses == pytest.approx(expected, rel=1e-6)
