"""The decoder equals transformers' models, under every layout: logits, loss, gradients, ten optimizer steps, weights.

One spawn a layout runs all families. The references are computed once, in the test's own process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layouts import every_layout
from safetensors.torch import load_file
from torch import Tensor

from megavlm.batch import IGNORED, TextBatch, next_token_batch
from megavlm.build.model import build_model
from megavlm.build.run_config import (
    DataParallelConfig,
    DecoderConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
    WeightsConfig,
    check_for_world,
)
from megavlm.export.hf_export import export_model, folder_tensors
from megavlm.infer.logits import compute_logits
from megavlm.model.decoder.state_map import decoder_state_map
from megavlm.parallel import groups as process_groups
from megavlm.parallel.schedule import forward_backward
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.testing import assert_gradients_close, assert_logits_close, assert_losses_close, spawn
from megavlm.train.optim import build_optimizer
from megavlm.train.step import train_step

ROWS, LENGTH, VOCABULARY, STEPS = 4, 16, 101, 10
DOCUMENTS = (5, 8, 3)  # of the packed row
FAMILIES = ("llama", "mistral", "qwen2")

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP=2": (2, {"tensor_model_parallel_size": 2}),
    "TP=2 with sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP=2": (2, {"pipeline_model_parallel_size": 2}),
    "interleaved PP=2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "uneven PP=2": (2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttL"}),
    "PP=2 cut by cost": (2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "auto"}),
    "TP=2 x PP=2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "DP=2": (2, {}),
    "TP=4 over 2 key-value heads": (4, {"tensor_model_parallel_size": 4}),
}


def transformers_config(family: str) -> transformers.PretrainedConfig:
    """Four layers with everything that tells the families apart, and a vocabulary that no degree divides."""
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": {"llama": 4, "mistral": 2, "qwen2": 2}[family],
        "head_dim": 12 if family == "mistral" else 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "tie_word_embeddings": family == "qwen2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6 if family == "qwen2" else 1e4},
    }
    kinds = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
    }
    return kinds[family](**shape)


def random_transformers_model(family: str) -> Any:
    """With norms and biases away from the ones and zeros they start from, where a mix-up would not show."""
    torch.manual_seed(FAMILIES.index(family))
    model = transformers.AutoModelForCausalLM.from_config(transformers_config(family), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def step_tokens(step: int) -> tuple[Tensor, Tensor]:
    """(tokens, labels in transformers' sense) of the global batch of one step: rows differ in what they train."""
    draw = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=draw)
    labels = tokens.clone()
    for row in range(ROWS):
        labels[row, : 2 * row + 1] = IGNORED
    return tokens, labels


def reference(family: str, folder: Path) -> dict[str, Any]:
    """What transformers computes: logits, loss, gradients, ten steps, and each packed document by itself."""
    model = random_transformers_model(family)
    model.save_pretrained(folder)
    tokens, labels = step_tokens(0)
    output = model(input_ids=tokens, labels=labels)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    documents = tokens[:1].split(DOCUMENTS, dim=1)
    alone = torch.cat([model(input_ids=document).logits.detach() for document in documents], dim=1)
    model.zero_grad()
    packed_loss(model, documents).backward()
    packed_gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {
        "logits": output.logits.detach(),
        "loss": output.loss.item(),
        "gradients": gradients,
        "document logits": alone,
        "document gradients": packed_gradients,
        "steps": ten_steps(model),
    }


def packed_loss(model: Any, documents: tuple[Tensor, ...]) -> Tensor:
    """The mean over all target tokens of the documents, each run alone."""
    sums = [model(input_ids=d, labels=d).loss * (d.size(1) - 1) for d in documents]
    return torch.stack(sums).sum() / sum(d.size(1) - 1 for d in documents)


def ten_steps(model: Any) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each step. Adam hides a gradient of the wrong scale; the norm shows it."""
    settings = OPTIMIZER
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )
    steps = []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens, labels = step_tokens(step)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        optimizer.step()
        steps.append((loss.item(), norm.item()))
    return steps


OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=1.0, adam_eps=1e-6)


def run_for(folder: Path, layout: dict[str, Any]) -> RunConfig:
    return RunConfig(
        name="parity",
        decoder=DecoderConfig.from_hf(json.loads((folder / "config.json").read_text())),
        parallel=ParallelConfig(**layout),
        precision=PrecisionConfig(params_dtype="float32"),
        data_parallel=DataParallelConfig(use_distributed_optimizer=True),
        optimizer=OPTIMIZER,
        train=TrainConfig(global_batch_size=ROWS, micro_batch_size=1, seq_length=LENGTH, train_iters=STEPS),
        weights=WeightsConfig(load_hf=str(folder)),
        make_vocab_size_divisible_by=4,
    )


# --- on the ranks ------------------------------------------------------------------------------------------------


def check_layout_of_all_families(layout: dict[str, Any], references: dict[str, dict[str, Any]], root: Path) -> None:
    world_size = process_groups.join()
    for family, expected in references.items():
        run = run_for(root / family, layout)
        check_for_world(run, world_size)
        groups = process_groups.start(run.parallel)
        check_numbers(run, groups, expected)
        check_round_trip(run, groups, root / family, root / f"{family}-exported")
        process_groups.stop()


def check_numbers(run: RunConfig, groups: process_groups.Groups, expected: dict[str, Any]) -> None:
    chunks = build_model(run, groups).chunks
    wrapped = wrap_data_parallel(list(chunks), run.data_parallel)
    optimizer, _ = build_optimizer(wrapped, run)
    optimizer.param_groups[0]["lr"] = run.optimizer.lr

    batches = microbatches(0, groups)
    logits = compute_logits(wrapped, batches, groups, VOCABULARY)
    if groups.is_last_stage:
        rows = slice(groups.data_rank, None, groups.data_size)
        assert_logits_close(torch.cat(logits), expected["logits"][rows])
    loss = forward_backward(wrapped, batches, groups).loss
    if groups.is_last_stage:
        assert_losses_close(loss, expected["loss"])
    check_gradients(wrapped, run, groups, expected["gradients"])

    packed = [packed_row()] * 2  # as many as there are stages: the interleaved schedule takes no fewer
    logits = compute_logits(wrapped, packed, groups, VOCABULARY)
    if groups.is_last_stage:
        assert_logits_close(logits[0], expected["document logits"], tolerance=1e-5)
    forward_backward(wrapped, packed, groups)
    check_gradients(wrapped, run, groups, expected["document gradients"], tolerance=1e-5)

    steps = [train_step(wrapped, optimizer, microbatches(step, groups), groups) for step in range(STEPS)]
    for mine, (loss, norm) in zip(steps, expected["steps"], strict=True):
        assert_losses_close(mine.grad_norm, norm, tolerance=1e-4)
        if groups.is_last_stage:
            assert_losses_close(mine.loss, loss)


def microbatches(step: int, groups: process_groups.Groups) -> list[TextBatch]:
    tokens, labels = step_tokens(step)
    mine = range(groups.data_rank, ROWS, groups.data_size)
    return [next_token_batch(tokens[[row]], labels[[row]]) for row in mine]


def packed_row() -> TextBatch:
    tokens, _ = step_tokens(0)
    bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).int()
    return next_token_batch(tokens[:1], cu_seqlens=bounds)


def check_gradients(
    wrapped: Any, run: RunConfig, groups: process_groups.Groups, expected: dict[str, Tensor], tolerance: float = 1e-4
) -> None:
    """The gradients of all stages together, as the folder's tensors, against the reference's of the same names."""
    for chunk in wrapped:
        gather_sharded_gradients(chunk)
    mine = dict(folder_tensors(wrapped, decoder_state_map(run.decoder), groups.collection.tp, gradient_of))
    stages: list[dict[str, Tensor]] = [{}] * groups.world_size
    torch.distributed.all_gather_object(stages, mine)
    assert_gradients_close({name: value for stage in stages for name, value in stage.items()}, expected, tolerance)


def gradient_of(parameter: Any) -> Tensor:
    return parameter.main_grad.clone()


def gather_sharded_gradients(chunk: Any) -> None:
    """The distributed optimizer leaves each data-parallel rank its slice of the reduced gradients."""
    for bucket in (bucket for group in chunk.bucket_groups for bucket in group.buckets):
        group = chunk.dp_cp_group
        slices = list(bucket.grad_data.chunk(group.size()))
        torch.distributed.all_gather(slices, slices[group.rank()].clone(), group=group)


def check_round_trip(run: RunConfig, groups: process_groups.Groups, folder: Path, exported: Path) -> None:
    """Import -> export gives back every bit, in float32 and in bf16."""
    for precision in (PrecisionConfig(params_dtype="float32"), PrecisionConfig(params_dtype="bfloat16")):
        again = run.replace(precision=precision)
        model = build_model(again, groups)
        export_model(model, again, groups, exported, overwrite=True)
        original = load_file(folder / "model.safetensors")
        mine = {name: tensor for file in exported.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert mine.keys() == original.keys()
        for name, tensor in original.items():
            assert torch.equal(mine[name], tensor.to(again.precision.dtype)), name
        torch.distributed.barrier()


# --- in the test's process -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    root = tmp_path_factory.mktemp("decoders")
    return root, {family: reference(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_transformers(layout: str, references: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path) -> None:
    root, expected = references
    world_size, degrees = LAYOUTS[layout]
    if layout == "TP=4 over 2 key-value heads":
        expected = {family: expected[family] for family in ("mistral", "qwen2")}
    spawn(check_layout_of_all_families, world_size, degrees, expected, root)


@pytest.mark.full
@pytest.mark.parametrize("layout", every_layout(), ids=lambda layout: layout[0])
def test_equals_transformers_in_every_layout(
    layout: tuple[str, int, dict[str, Any]], references: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    root, expected = references
    _, world_size, degrees = layout
    spawn(check_layout_of_all_families, world_size, degrees, expected, root)
