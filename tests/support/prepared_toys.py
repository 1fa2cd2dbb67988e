"""Prepared toy data sets with their token counts, and the data settings of a run on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.data.chat import ChatConfig
from megavlm.data.formats import Words
from megavlm.data.order import SourceConfig, StreamConfig
from megavlm.data.packing import PackLimits
from megavlm.data.shards import write_shards
from megavlm.data.step_plan import DataConfig
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import SampleKind, ToyWorld


def prepare_toys(
    root: Path, tokenizer: Path, chat: ChatConfig, counts: dict[SampleKind, int], world: ToyWorld | None = None
) -> Path:
    """A data set for each kind of sample."""
    words = Words(Tokenizer(tokenizer), chat)
    for kind, count in counts.items():
        write_shards([list(toy_samples(kind, "train", 0, count, world))], root / kind)
        add_token_counts(root / kind, words.count, words.name, words.hash)
    return root


def data_config(
    root: Path, tokenizer: Path, chat: ChatConfig, streams: Sequence[StreamConfig], **changes: Any
) -> DataConfig:
    defaults: dict[str, Any] = {"rows": PackLimits(max_tokens=512, rows_multiple=4, length_multiple=8)}
    return DataConfig(
        path=str(root), tokenizer=str(tokenizer), chat=chat, streams=tuple(streams), **{**defaults, **changes}
    )


def stream(kinds: Sequence[SampleKind], samples: int, **changes: Any) -> StreamConfig:
    """An endless blend of kinds in equal parts."""
    sources = tuple(SourceConfig(name=kind, weight=1) for kind in kinds)
    return StreamConfig(samples_per_step=samples, sources=sources, **changes)
