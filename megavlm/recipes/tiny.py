"""Runs that fit on a laptop: they show the whole path, and their numbers mean nothing.

    torchrun --nproc-per-node 2 -m megavlm train decoder-tiny --tensor-model-parallel-size 2

Hardware: two CPU cores. Time: about half a minute. Expected: `lm loss` falls from 4.6 to below 1.

    make quickstart                               # infimm-tiny's three stages from toy bases, and what they learnt
    make quickstart FAMILY=aquila-vl              # aquila-vl-tiny's six
    megavlm train infimm-tiny/pretrain --data-path data --load-hf FOLDER

The stages of InfiMM and of Aquila-VL on the toy world: models of 2M parameters each, the same streams, thirds, grids,
trainables and templates. Data sets: toy-pairs, toy-documents, toy-chat, toy-multi_image and toy-text below
`--data-path`. The tokens of the tags are those of the toy tokenizer; those of another are asked of the settings, and a
wrong number is refused with the right one. `megavlm.toy.bases` writes folders to start from (`infimm_base`,
`aquila_vl_base`), `megavlm.toy.data.prepare_toy_data` the data sets. Time and result: docs/quickstart.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megavlm.build.run_config import (
    AquilaVLConfig,
    CrossAttentionConfig,
    DataConfig,
    DecoderConfig,
    EvaConfig,
    InfiMMConfig,
    OptimizerConfig,
    PackLimits,
    PrecisionConfig,
    ResamplerConfig,
    RunConfig,
    SiglipConfig,
    SourceConfig,
    StreamConfig,
    TrainConfig,
)
from megavlm.recipes import aquila_vl, infimm
from megavlm.tiles import STAGE_GRIDS, GridConfig


def decoder_tiny() -> RunConfig:
    """A LLaMA-like decoder of 0.4M parameters on made-up text."""
    return RunConfig(
        name="decoder-tiny",
        decoder=DecoderConfig(
            num_layers=4,
            hidden_size=96,
            ffn_hidden_size=256,
            num_attention_heads=4,
            num_query_groups=4,
            kv_channels=24,
            vocab_size=100,
            max_position_embeddings=256,
            init_method_std=0.1,
        ),
        precision=PrecisionConfig(params_dtype="float32"),
        optimizer=OptimizerConfig(lr=3e-3, lr_decay_style="cosine", lr_warmup_iters=10, min_lr=3e-4),
        train=TrainConfig(train_iters=200, global_batch_size=16, micro_batch_size=4, seq_length=64, log_interval=10),
        make_vocab_size_divisible_by=8,
    )


def decoder_tiny_qwen2() -> RunConfig:
    """The same with what Qwen2.5 has: biases on queries, keys and values, grouped queries, tied embeddings."""
    base = decoder_tiny()
    return base.replace(
        name="decoder-tiny-qwen2",
        decoder=base.decoder.replace(
            family="qwen2",
            num_query_groups=2,
            add_qkv_bias=True,
            vocab_size=512,
            tied_embeddings=True,
            rotary_base=1_000_000,
        ),
    )


ROW = 2048
DECODER = DecoderConfig(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=263,
    max_position_embeddings=2048,
    init_method_std=0.05,
    bos_token_id=1,
    eos_token_ids=(2,),
)
EVA = EvaConfig(
    image_size=64,
    patch_size=8,
    width=96,
    depth=4,
    head_width=24,
    mlp_width=384,
    mlp="gelu",
    sub_norm=False,
    rope=True,
    post_norm=False,
    head_dim_out=16,
)
INFIMM = InfiMMConfig(
    model_type="infimm-llama",
    tower=EVA,
    resampler=ResamplerConfig(width=EVA.width, depth=2, heads=4, head_width=48, mlp_ratio=2),
    cross_attention=CrossAttentionConfig(every_n_layers=1, heads=4, head_width=48, ff_multiple=2),
    image_token_id=262,
    eoc_token_id=261,
)
QWEN = DECODER.replace(family="qwen2", add_qkv_bias=True, eos_token_ids=(4,))
"""The same decoder in Qwen2.5's form, though with as many keys as queries and an output layer of its own."""
SIGLIP = SiglipConfig(image_size=56, patch_size=14, width=96, depth=4, heads=4, mlp_width=384)
AQUILA_VL = AquilaVLConfig(
    tower=SIGLIP,
    grid=GridConfig(tile_size=SIGLIP.image_size, patch_size=SIGLIP.patch_size),
    image_token_id=262,
    video_token_id=5,
)
AQUILA_VL_STEPS = {
    "1": (200, 2e-3),
    "2a": (150, 1e-3),
    "2b": (150, 1e-3),
    "2c": (150, 1e-3),
    "3": (150, 1e-3),
    "4": (100, 5e-4),
}
"""Steps and learning rate of each stage."""


def infimm_tiny_pretrain() -> RunConfig:
    """A toy InfiMM on toy captions and documents: resampler, gated blocks and the two new tokens learn."""
    pairs = _stream(16, {"toy-pairs": 1}, name="pairs", tokens_per_sample=128)
    documents = _stream(4, {"toy-documents": 1}, name="documents", tokens_per_sample=512)
    return _infimm("pretrain", infimm.llama2_pretrain(), 300, 2e-3, pairs, documents)


def infimm_tiny_multitask() -> RunConfig:
    """A toy InfiMM on toy questions about one picture: resampler and gated blocks learn."""
    tasks = _stream(16, {"toy-chat": 1}, name="tasks", tokens_per_sample=512)
    return _infimm("multitask", infimm.llama2_multitask(), 460, 2e-3, tasks)


def infimm_tiny_finetune() -> RunConfig:
    """A toy InfiMM on toy conversations about one picture, several and none: all but the tower learns."""
    sources = {"toy-chat": 6, "toy-multi_image": 1, "toy-text": 1}
    conversations = _stream(16, sources, name="conversations", tokens_per_sample=512)
    return _infimm("finetune", infimm.llama2_finetune(), 200, 1e-3, conversations)


def _infimm(stage: str, real: RunConfig, steps: int, lr: float, *streams: StreamConfig) -> RunConfig:
    return _toy(real, streams, steps, lr, name=f"infimm-tiny/{stage}", decoder=DECODER, infimm=INFIMM)


def aquila_vl_tiny(stage: str) -> RunConfig:
    """A stage of a toy Aquila-VL: captions (1) or conversations, cut into the stage's grids."""
    real = aquila_vl.RECIPES[f"aquila-vl-2b/{stage}"]()
    assert real.data is not None
    first = real.data.streams[0].sources[0]
    weights = {"toy-pairs": 1} if stage == "1" else {"toy-chat": 6, "toy-multi_image": 1, "toy-text": 1}
    samples = _stream(16, weights, name="samples", part=first.part, parts=first.parts)
    grid = STAGE_GRIDS[stage].replace(tile_size=SIGLIP.image_size, patch_size=SIGLIP.patch_size)
    steps, lr = AQUILA_VL_STEPS[stage]
    return _toy(
        *(real, (samples,), steps, lr),
        name=f"aquila-vl-tiny/{stage}",
        decoder=QWEN,
        aquila_vl=AQUILA_VL.replace(grid=grid),
    )


def _toy(real: RunConfig, streams: tuple[StreamConfig, ...], steps: int, lr: float, **model: Any) -> RunConfig:
    """A real stage with another model, data and length; what learns, chat format and form of the schedule stay."""
    assert real.data is not None
    warmup = 0 if real.optimizer.lr_warmup_fraction else round(steps * _warmup_share(real))
    return RunConfig(
        trainable=real.trainable,
        precision=PrecisionConfig(params_dtype="float32"),
        optimizer=real.optimizer.replace(
            lr=lr,
            min_lr=lr * real.optimizer.min_lr / real.optimizer.lr,
            lr_warmup_iters=warmup,
            adam_eps=1e-8,  # gradients are small here
        ),
        train=TrainConfig(train_iters=steps, log_interval=10),
        data=DataConfig(
            streams=streams,
            chat=real.data.chat,
            rows=PackLimits(max_tokens=ROW, rows_multiple=4, length_multiple=16),
        ),
        make_vocab_size_divisible_by=8,
        **model,
    )


def _warmup_share(real: RunConfig) -> float:
    return real.optimizer.warmup_steps(real.train.train_iters) / real.train.train_iters


def _stream(
    samples: int,
    weights: Mapping[str, float],
    *,
    name: str,
    tokens_per_sample: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> StreamConfig:
    """An endless blend of toy data sets, or of one part of each, by their weights."""
    return StreamConfig(
        name=name,
        samples_per_step=samples,
        tokens_per_sample=tokens_per_sample,
        over_long="cut",
        sources=tuple(
            SourceConfig(name=source, weight=weight, part=part, parts=parts) for source, weight in weights.items()
        ),
    )


def aquila_vl_tiny_1() -> RunConfig:
    """A toy Aquila-VL on toy captions, one tile a picture: the projector learns."""
    return aquila_vl_tiny("1")


def aquila_vl_tiny_2a() -> RunConfig:
    """A toy Aquila-VL on the first third of the toy conversations, up to 2x2 tiles: all learns."""
    return aquila_vl_tiny("2a")


def aquila_vl_tiny_2b() -> RunConfig:
    """A toy Aquila-VL on the second third, up to 3x3 tiles: all learns."""
    return aquila_vl_tiny("2b")


def aquila_vl_tiny_2c() -> RunConfig:
    """A toy Aquila-VL on the last third, up to 4x4 tiles: all learns."""
    return aquila_vl_tiny("2c")


def aquila_vl_tiny_3() -> RunConfig:
    """A toy Aquila-VL on all toy conversations, up to 6x6 tiles: all learns."""
    return aquila_vl_tiny("3")


def aquila_vl_tiny_4() -> RunConfig:
    """A toy Aquila-VL on all toy conversations once more, up to 6x6 tiles: all learns."""
    return aquila_vl_tiny("4")


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "decoder-tiny": decoder_tiny,
    "decoder-tiny-qwen2": decoder_tiny_qwen2,
    "infimm-tiny/pretrain": infimm_tiny_pretrain,
    "infimm-tiny/multitask": infimm_tiny_multitask,
    "infimm-tiny/finetune": infimm_tiny_finetune,
    "aquila-vl-tiny/1": aquila_vl_tiny_1,
    "aquila-vl-tiny/2a": aquila_vl_tiny_2a,
    "aquila-vl-tiny/2b": aquila_vl_tiny_2b,
    "aquila-vl-tiny/2c": aquila_vl_tiny_2c,
    "aquila-vl-tiny/3": aquila_vl_tiny_3,
    "aquila-vl-tiny/4": aquila_vl_tiny_4,
}
