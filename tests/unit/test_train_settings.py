"""Settings of a run that make no sense beside one another."""

from __future__ import annotations

import pytest

from megavlm.errors import ConfigError
from megavlm.recipes import recipe


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("infimm-tiny/pretrain", "train.eval_interval=10", "has no held-out data; give --valid-data-path as well"),
        ("infimm-tiny/pretrain", "data.valid_path=there", "is never evaluated on; give --eval-interval as well"),
        ("infimm-tiny/pretrain", "optimizer.decoder_lr=1e-5", "is for a trained decoder, and this run's is frozen"),
        ("aquila-vl-tiny/2a", "optimizer.cross_attention_lr=1e-5", "or name cross_attention among --trainable"),
        ("aquila-vl-tiny/2a", "optimizer.connector_lr=0", "must be positive"),
        (
            "infimm-tiny/pretrain",
            "train.global_batch_size=64",
            "train.global_batch_size = 64: is not the 20 samples a step that the data's streams have together "
            "(pairs 16, documents 4); leave it out, and set data.streams.0.samples_per_step and data.streams.1.",
        ),
        ("infimm-tiny/pretrain", "train.micro_batch_size=2", "= 2: is for toy text: of prepared data one row"),
        (
            "infimm-tiny/pretrain",
            "train.seq_length=512",
            "= 512: is not the 2048 tokens that a row of the data may have",
        ),
        ("decoder-tiny", "train.max_nan_iterations=0", "must be at least 1"),
        ("decoder-tiny", "train.exit_duration_in_mins=0", "must be above 0"),
    ],
)
def test_settings_that_are_refused(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe(name).override(override)
    assert message in str(refused.value)


def test_the_streams_decide_what_a_step_of_prepared_data_is() -> None:
    run = recipe("infimm-tiny/pretrain")
    assert run.override("train.global_batch_size=20", "train.seq_length=2048").samples_per_step == 20
    changed = run.override("data.streams.1.samples_per_step=16", "data.rows.max_tokens=512")
    assert (changed.samples_per_step, changed.row_tokens) == (32, 512)


def test_toy_text_needs_no_held_out_data() -> None:
    assert recipe("decoder-tiny").override("train.eval_interval=10").train.eval_iters == 10
