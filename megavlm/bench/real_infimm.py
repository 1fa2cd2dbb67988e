"""InfiMM-Zephyr-7B in half its layers on one GPU: a step of pretraining, against our exported files in transformers.

Resampler and gated blocks learn; tower and decoder are frozen. The two new tokens, whose rows learn as well in the
recipe, are frozen here: transformers has no such rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.batch import IGNORED, AttendedMedia, TextBatch, next_token_batch, preceding_images
from megavlm.bench.harness import Comparison, Measurement
from megavlm.bench.real_step import Workload, real_step
from megavlm.export.infimm_files import modeling_infimm
from megavlm.export.infimm_folder import architecture
from megavlm.model.infimm.config import infimm_to_hf
from megavlm.plan.rows import PlannedDocument, PlannedRow
from megavlm.recipes import recipe
from megavlm.tiles import GridConfig, patch_rows, plan_image

LAYERS = 16
ROWS = 4
GATE = 0.5
"""A fresh gate is 0 and would hide whatever the blocks compute."""


@contextmanager
def real_infimm(quick: bool) -> Iterator[Comparison | Measurement]:
    """Both sides, one after the other."""
    with real_step(InfiMM(quick), quick) as found:
        yield found


class InfiMM(Workload):
    """Rows of two documents and eight pairs, about as the recipe blends them."""

    name = "infimm-7b"

    def __init__(self, quick: bool) -> None:
        run = recipe("infimm-tiny/pretrain" if quick else "infimm-zephyr-7b/pretrain")
        parts = run.infimm
        assert parts is not None
        decoder = run.decoder if quick else run.decoder.replace(num_layers=LAYERS)
        self.run, self._parts = run.replace(decoder=decoder, trainable=("cross_attention", "resampler")), parts
        self._documents, self._pairs = (2, 2) if quick else (2, 8)
        self._document_tokens, self._pair_tokens = (40, 16) if quick else (792, 32)
        self._images = 2 if quick else 4
        row = self._documents * self._document_tokens + self._pairs * self._pair_tokens
        self.about = (
            f"{decoder.num_layers} layers of {decoder.hidden_size}; {ROWS} rows of {row} tokens a step, each of "
            f"{self._documents} documents with {self._images} pictures and {self._pairs} pairs; theirs in batches of "
            "documents and of pairs, without padding"
        )

    @property
    def _kind(self) -> Any:
        """The class that an exported folder names."""
        return getattr(modeling_infimm, architecture(self._parts.model_type))

    def fresh_model(self) -> Any:
        config = self._kind.config_class(**infimm_to_hf(self.run.decoder, self._parts, "float32"))
        model = self._kind(config)
        for module in model.modules():
            if isinstance(module, modeling_infimm.GatedCrossAttentionBlock):
                nn.init.constant_(module.attn_gate, GATE)
                nn.init.constant_(module.ff_gate, GATE)
        return model

    def model_of(self, folder: Path) -> Any:
        model = self._kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("gated_cross_attn_layer" in name or ".perceiver." in name)
        return model

    def our_step(self, number: int) -> Sequence[TextBatch]:
        return [self._packed([*documents, *pairs]) for documents, pairs in self._rows(number)]

    def planned_step(self, number: int) -> Sequence[PlannedRow]:
        side = self._parts.tower.image_size
        grid = GridConfig(tile_size=side, patch_size=self._parts.tower.patch_size, tiling="single")
        document, pair = (
            PlannedDocument(tokens, (plan_image(side, side, "image", grid),) * pictures)
            for tokens, pictures in ((self._document_tokens, self._images), (self._pair_tokens, 1))
        )
        samples = (*(document,) * self._documents, *(pair,) * self._pairs)
        return [PlannedRow(samples, sum(one.tokens for one in samples))] * ROWS

    def their_step(self, number: int) -> Sequence[dict[str, Tensor]]:
        """The documents of two rows at a time, then all pairs."""
        documents, pairs = zip(*self._rows(number), strict=True)
        batches = [list(chain(*documents[first : first + 2])) for first in range(0, ROWS, 2)]
        return [self._batch(samples) for samples in (*batches, list(chain(*pairs)))]

    def _rows(self, number: int) -> list[tuple[list[_Sample], list[_Sample]]]:
        """(documents, pairs) of each row of a step."""
        draw = torch.Generator().manual_seed(number)
        return [
            (
                [self._sample(self._document_tokens, self._images, draw) for _ in range(self._documents)],
                [self._sample(self._pair_tokens, 1, draw) for _ in range(self._pairs)],
            )
            for _ in range(ROWS)
        ]

    def _sample(self, length: int, images: int, draw: torch.Generator) -> _Sample:
        """Words, with the pictures' tags spread evenly over them."""
        tokens = torch.randint(3, self._parts.eoc_token_id, (length,), generator=draw)
        tokens[torch.arange(images) * length // images] = self._parts.image_token_id
        side = self._parts.tower.image_size
        return _Sample(tokens, torch.rand(images, 3, side, side, generator=draw) * 2 - 1)

    def _packed(self, samples: Sequence[_Sample]) -> TextBatch:
        """All samples behind one another in one row."""
        tokens = torch.cat([sample.tokens for sample in samples])[None]
        lengths = torch.tensor([0, *(len(sample.tokens) for sample in samples)])
        bounds = lengths.cumsum(0).to(torch.int32)
        counts = [len(sample.pixels) for sample in samples]
        image_of_token, has_image = preceding_images(tokens, self._parts.image_token_id, counts, bounds)
        patches = patch_rows(torch.cat([sample.pixels for sample in samples]), self._parts.tower.patch_size)
        media = AttendedMedia(patches, (1,) * sum(counts), image_of_token=image_of_token, has_image=has_image)
        return replace(next_token_batch(tokens, self._labels(tokens), bounds), media=media)

    def _batch(self, samples: Sequence[_Sample]) -> dict[str, Tensor]:
        """Samples of one length."""
        tokens = torch.stack([sample.tokens for sample in samples])
        images = torch.stack([sample.pixels for sample in samples])
        return {"input_ids": tokens, "labels": self._labels(tokens), "images": images}

    def _labels(self, tokens: Tensor) -> Tensor:
        return tokens.masked_fill(tokens == self._parts.image_token_id, IGNORED)


@dataclass(frozen=True)
class _Sample:
    """Tokens [length] and pictures [images, 3, side, side]."""

    tokens: Tensor
    pixels: Tensor
