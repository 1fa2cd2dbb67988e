"""Aquila-VL-2B on one GPU: a training step at the shapes of stage 2a, all learning, against transformers with SDPA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from megavlm.batch import TextBatch
from megavlm.bench.aquila_vl_samples import DrawnSample, Shapes, drawn_samples, packed, padded, padding_of
from megavlm.bench.harness import Comparison, Measurement
from megavlm.bench.real_step import Workload, real_step
from megavlm.build.run_config import RecomputeConfig
from megavlm.model.aquila_vl.config import transformers_config
from megavlm.plan.rows import PlannedDocument, PlannedRow
from megavlm.recipes import recipe

SIZES = ((640, 480), (1000, 750), (1024, 899), (1920, 1080), (384, 384), (480, 640), (800, 2400))
SMALL_SIZES = ((64, 48), (56, 56), (128, 112))
ROWS, BATCHES = 2, 4
"""Microbatches of a step: ours of packed rows, theirs of samples of like lengths, as those train who pad."""


@contextmanager
def real_aquila_vl(quick: bool) -> Iterator[Comparison | Measurement]:
    """Both sides, one after the other."""
    with real_step(AquilaVL(quick), quick) as found:
        yield found


class AquilaVL(Workload):
    """Stage 2a of the 2B model, or of the toy."""

    name = "aquila-vl-2b"

    def __init__(self, quick: bool) -> None:
        run = recipe("aquila-vl-tiny/2a" if quick else "aquila-vl-2b/2a")
        parts = run.aquila_vl
        assert parts is not None
        # Both sides recompute all layers, the tower's too: that a GPU of 80 GB holds either.
        everything = RecomputeConfig(granularity="full", method="uniform", num_layers=1, vision_tower=True)
        self.run, self._parts = run.replace(recompute=everything), parts
        self._shapes = Shapes(
            grid=parts.grid,
            sizes=SMALL_SIZES if quick else SIZES,
            text=24 if quick else 128,
            text_alone=32 if quick else 512,
            image_token=parts.image_token_id,
            words=range(3, min(parts.image_token_id, 151_643)),
            multiple=16,  # which FP8 asks of a row
        )
        samples = drawn_samples(self._shapes, 0)
        tokens, tiles = sum(len(one.tokens) for one in samples), sum(len(one.tiles) for one in samples)
        self.about = (
            f"{len(samples)} samples of {tokens} tokens and {tiles} tiles a step, all layers recomputed; padding "
            f"{100 * padding_of(samples, self.their_step(0)):.1f} % in their {self._batches} batches of like lengths"
        )

    def fresh_model(self) -> Any:
        config = transformers_config(self.run.decoder, self._parts, "float32")
        return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig.from_dict(config))

    def model_of(self, folder: Path) -> Any:
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def our_step(self, number: int) -> Sequence[TextBatch]:
        """Rows of about the same length."""
        return [packed(row, self._shapes) for row in self._rows(number)]

    def planned_step(self, number: int) -> Sequence[PlannedRow]:
        return [
            PlannedRow(
                tuple(PlannedDocument(_length(one), (one.plan,) if one.plan else ()) for one in row),
                sum(map(_length, row)),
            )
            for row in self._rows(number)
        ]

    def _rows(self, number: int) -> list[list[DrawnSample]]:
        rows: list[list[DrawnSample]] = [[] for _ in range(ROWS)]
        for sample in sorted(drawn_samples(self._shapes, number), key=_length, reverse=True):
            min(rows, key=lambda row: sum(map(_length, row))).append(sample)
        return rows

    def their_step(self, number: int) -> Sequence[dict[str, Tensor]]:
        samples = sorted(drawn_samples(self._shapes, number), key=_length, reverse=True)
        each = -(-len(samples) // self._batches)
        return [padded(samples[first : first + each], self._shapes) for first in range(0, len(samples), each)]

    @property
    def _batches(self) -> int:
        return min(BATCHES, (len(self._shapes.sizes) + 1) // 2)


def _length(sample: DrawnSample) -> int:
    return len(sample.tokens)
