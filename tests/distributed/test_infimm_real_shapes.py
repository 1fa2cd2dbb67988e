"""The three real InfiMM models at full size, without memory: their counts, and one rank of 40 in fake tensors."""

from __future__ import annotations

import pytest
import torch
from fake_world import join_fake_world
from torch._subclasses.fake_tensor import FakeTensorMode

from megavlm.batch import AttendedMedia, TextBatch
from megavlm.build.model import build_model
from megavlm.build.run_config import DecoderConfig, InfiMMConfig, ParallelConfig, PrecisionConfig, RunConfig
from megavlm.model.cross_attention import CrossAttentionConfig
from megavlm.model.freeze import count_parts
from megavlm.model.infimm.state_map import infimm_state_map
from megavlm.model.resampler import ResamplerConfig
from megavlm.model.towers.eva_config import eva_tower
from megavlm.parallel import groups as process_groups
from megavlm.parallel.schedule import run_schedule
from megavlm.testing import spawn

LLAMA_13B = {
    "family": "llama",
    "num_layers": 40,
    "hidden_size": 5120,
    "ffn_hidden_size": 13824,
    "num_attention_heads": 40,
    "num_query_groups": 40,
    "kv_channels": 128,
    "vocab_size": 32002,
}
MISTRAL_7B = {
    "family": "mistral",
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 32002,
}

# name -> (decoder, tower, a gated block before every nth layer, all parameters, those of resampler and gated blocks)
REAL = {
    "infimm-zephyr": (MISTRAL_7B, "EVA02-CLIP-L/14-336", 2, 9_840_832_224, 63_019_008 + 16 * 139_476_994),
    "infimm-vicuna": (LLAMA_13B, "EVA02-CLIP-E/14-224", 4, 19_710_920_980, 176_343_552 + 10 * 216_813_570),
    "infimm-llama": (LLAMA_13B, "EVA01-CLIP-g/14-224", 4, 16_305_280_660, 112_603_392 + 10 * 216_420_354),
}


def real_run(name: str, **parallel: object) -> RunConfig:
    decoder, tower_name, every, _, _ = REAL[name]
    tower = eva_tower(tower_name)
    return RunConfig(
        name=name,
        decoder=DecoderConfig.from_dict(decoder),
        infimm=InfiMMConfig(
            model_type=name,
            tower=tower,
            resampler=ResamplerConfig(width=tower.width),
            cross_attention=CrossAttentionConfig(every_n_layers=every),
        ),
        trainable=("cross_attention", "resampler"),
        parallel=ParallelConfig.from_dict(parallel),
        precision=PrecisionConfig(params_dtype="bfloat16"),
        make_vocab_size_divisible_by=2,
    )


def count_real_parameters(name: str) -> tuple[int, int]:
    join_fake_world(1)
    run = real_run(name)
    groups = process_groups.start(run.parallel)
    with FakeTensorMode():
        model = build_model(run, groups)
        everything = sum(parameter.numel() for part in model.parts() for parameter in part.parameters())
        return everything, sum(count.trained for count in count_parts(model.chunks))


def one_rank_forward_and_backward(sequence_parallel: bool) -> dict[str, int]:
    """LLaMA2-13B at TP=4 over 40 processes: rank 0, three rows of 384 tokens with six images."""
    join_fake_world(40)
    run = real_run("infimm-llama", tensor_model_parallel_size=4, sequence_parallel=sequence_parallel)
    assert run.infimm is not None
    groups = process_groups.start(run.parallel)
    rows, length, images = 3, 384, 6
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(run, groups)
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        tower = run.infimm.tower
        media = AttendedMedia(
            torch.zeros(images * tower.patches, tower.patch_values),
            (1,) * images,
            image_of_token=torch.zeros(rows, length, dtype=torch.int64),
            has_image=torch.ones(rows, length, dtype=torch.bool),
        )
        batch = TextBatch(tokens, tokens, torch.ones(rows, length), media=media)

        def total(batch: TextBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            assert losses.shape == (rows, length)
            return losses.sum(), torch.tensor(rows * length, dtype=torch.int32), None

        for chunk in model.chunks:
            chunk.config.finalize_model_grads_func = None
        run_schedule(model.chunks, [batch], total, inputs=model.inputs)
        got = {n: tuple(p.grad.shape) for c in model.chunks for n, p in c.named_parameters() if p.grad is not None}
        wanted = {n: tuple(p.shape) for c in model.chunks for n, p in c.named_parameters() if p.requires_grad}
        assert got == wanted
        return {count.part: count.parameters for count in count_parts(model.chunks)}


@pytest.mark.parametrize("name", REAL)
def test_parameter_counts_of_the_real_models(name: str) -> None:
    *_, everything, trained = REAL[name]
    assert spawn(count_real_parameters, 1, name) == [(everything, trained)]
    run = real_run(name)
    assert run.infimm is not None
    shapes = infimm_state_map(run.decoder, run.infimm).folder_shapes()
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == everything


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_rank_of_llama2_13b_in_fake_tensors(sequence_parallel: bool) -> None:
    (parts,) = spawn(one_rank_forward_and_backward, 1, sequence_parallel)
    # A quarter of every sliced weight, and the norms whole.
    assert parts["decoder"] == (13_015_884_800 - 81 * 5120) // 4 + 81 * 5120 + (32008 - 32002) * 2 * 5120 // 4
    assert parts["resampler"] == 112_603_392
