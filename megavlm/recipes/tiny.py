"""Runs that fit on a laptop: they show the whole path in seconds, and their numbers mean nothing.

    torchrun --nproc-per-node 2 -m megavlm train decoder-tiny --tensor-model-parallel-size 2

Hardware: two CPU cores. Time: about half a minute. Expected: `lm loss` falls from 4.6 to below 1.
"""

from __future__ import annotations

from megavlm.build.run_config import DecoderConfig, OptimizerConfig, PrecisionConfig, RunConfig, TrainConfig


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
            family="qwen2", num_query_groups=2, add_qkv_bias=True, tied_embeddings=True, rotary_base=1_000_000
        ),
    )
