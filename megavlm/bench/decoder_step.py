"""One training step of a 100M-parameter Qwen2.5-shaped decoder: ours against transformers' model and torch's AdamW.

Both sides start from the same weights and see the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from megavlm.batch import TextBatch
from megavlm.bench.harness import THREADS, Comparison
from megavlm.bench.steps import our_side, their_side
from megavlm.build.model import Model, build_model
from megavlm.build.run_config import DecoderConfig, OptimizerConfig, PrecisionConfig, RunConfig, TrainConfig
from megavlm.data.toy_text import toy_step
from megavlm.export.hf_export import export_model
from megavlm.parallel import groups as parallel_groups
from megavlm.parallel.groups import Groups

TARGET = 1.05


def run_of(quick: bool) -> RunConfig:
    """The run that both sides do; `quick` is the same path at toy size."""
    decoder = DecoderConfig(
        family="qwen2",
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=2048,
        num_attention_heads=12,
        num_query_groups=2,
        kv_channels=64,
        vocab_size=32000,
        rotary_base=1_000_000,
        norm_epsilon=1e-6,
        add_qkv_bias=True,
        tied_embeddings=True,
    )
    if quick:
        decoder = decoder.replace(
            num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, kv_channels=16, vocab_size=250
        )
    return RunConfig(
        name="decoder-step",
        decoder=decoder,
        precision=PrecisionConfig(params_dtype="float32"),
        optimizer=OptimizerConfig(lr=1e-4),
        train=TrainConfig(global_batch_size=1, seq_length=64 if quick else 512),
    )


@contextmanager
def decoder_step(quick: bool) -> Iterator[Comparison]:
    """Both sides in this process, from the same weights."""
    torch.set_num_threads(THREADS)
    run = run_of(quick)
    parallel_groups.join()
    groups = parallel_groups.start(run.parallel, run.train.seed)
    built = build_model(run, groups)
    model = same_model(built, run, groups)
    shape = run.decoder
    try:
        yield Comparison(
            benchmark="decoder-step",
            case=(
                f"{model.num_parameters() / 1e6:.0f}M Qwen2.5-shaped decoder ({shape.num_layers} layers of "
                f"{shape.hidden_size}, vocabulary {shape.vocab_size}), float32, 1 row of {run.row_tokens} tokens"
            ),
            ours=our_side(built, run, groups, rows_of(run)),
            theirs=their_side(
                model,
                run.optimizer,
                groups.device,
                ([{"input_ids": row.tokens, "labels": row.tokens} for row in rows] for rows in rows_of(run)),
            ),
            target=TARGET,
            rounds=3 if quick else 20,
            warmup=1 if quick else 3,
        )
    finally:
        parallel_groups.stop()


def same_model(built: Model, run: RunConfig, groups: Groups) -> Qwen2ForCausalLM:
    """transformers' model with our weights."""
    disable_progress_bar()
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "weights"
        export_model(built, run, groups, folder)
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.to(groups.device)


def rows_of(run: RunConfig) -> Iterator[Sequence[TextBatch]]:
    """The microbatches of each step: one."""
    for step in count():
        yield toy_step(
            seed=run.train.seed,
            step=step,
            global_batch_size=1,
            micro_batch_size=1,
            seq_length=run.row_tokens,
            vocab_size=run.decoder.vocab_size,
            data_rank=0,
            data_size=1,
        )
