"""Runs of a tiny decoder on prepared text, which leave checkpoints and a ledger to compare."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from prepared_toys import prepare_toys
from qwen_hf import write_tokenizer

from megavlm.build.run_config import ParallelConfig, RunConfig
from megavlm.checkpoint.shelf import checkpoint_path, read_run
from megavlm.data.chat import ChatConfig
from megavlm.options import parse_options
from megavlm.parallel import groups as process_groups
from megavlm.recipes import recipe
from megavlm.testing import spawn


def prepare_text(root: Path) -> Path:
    """A data set, and its tokenizer."""
    prepare_toys(root / "data", write_tokenizer(root / "tokenizer"), ChatConfig(), {"text": 40})
    return root


def text_options(root: Path, save: Path, steps: int) -> list[str]:
    """What follows `megavlm train decoder-tiny`: with dropout, saved every two steps."""
    options = {
        "--train-iters": steps,
        "--global-batch-size": "none",
        "--micro-batch-size": 1,
        "--data-path": root / "data",
        "--save": save,
        "--save-interval": 2,
        "decoder.hidden_dropout": 0.1,
        "decoder.vocab_size": 384,
        "data.tokenizer": root / "tokenizer",
        "data.rows": "{max_tokens: 64, rows_multiple: 4, length_multiple: 16}",
        "data.streams": "[{samples_per_step: 6, over_long: cut, sources: [{name: text, weight: 1}]}]",
    }
    return [
        word
        for name, value in options.items()
        for word in ([name, str(value)] if name.startswith("--") else [f"{name}={value}"])
    ]


def text_run(root: Path, save: Path, steps: int, *more: str) -> RunConfig:
    """The same as settings."""
    return parse_options(recipe("decoder-tiny"), [*text_options(root, save, steps), *more], "test")


def assert_same_end(one: Path, other: Path, steps: int) -> None:
    """Two runs of one layout: the same bits of weights, optimizer, schedule and generators, and the same ledger."""
    spawn(_compare, 1, checkpoint_path(one, steps), checkpoint_path(other, steps))
    ledgers = [{file.name: file.read_text() for file in folder.glob("ledger/rank-*.jsonl")} for folder in (one, other)]
    assert ledgers[0] and ledgers[0] == ledgers[1]


def _compare(one: Path, other: Path) -> None:
    process_groups.join()
    process_groups.start(ParallelConfig())
    records = [read_run(path) for path in (one, other)]
    for name in ("step", "optimizer_steps", "scheduler_steps"):
        assert records[0][name] == records[1][name], name
    mine, theirs = (dist_checkpointing.load_plain_tensors(str(path)) for path in (one, other))
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("generators.") for name in mine)
    for name, tensor in mine.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, theirs[name]), name
