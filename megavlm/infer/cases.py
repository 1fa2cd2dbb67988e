"""Files of cases: inputs, and what the public implementation made of them.

Tensors named `<case>.<what>`: `input_ids` [B, T]; `logits` [B, T, V]; and for training `labels` [B, T] (-100: ignored),
`loss` [1] and `grad.<name in the folder>`. `attention_mask` [B, T] is 0 where a row is padded on its right, which is
then not compared. InfiMM's images: `images` [B, N, 3, H, W], of which a row takes as many as it has tags, in order.
Aquila-VL's are what transformers' processor makes, see `infer.spliced_cases`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megavlm.batch import IGNORED, AttendedMedia, TextBatch, next_token_batch, preceding_images
from megavlm.build.families import state_map_of
from megavlm.build.run_config import InfiMMConfig, RunConfig
from megavlm.checkpoint.weight_files import open_weight_file
from megavlm.data.assemble_tables import spliced_batch
from megavlm.errors import DataError
from megavlm.infer.spliced_cases import MEDIA_TENSORS, check_media, is_whole, read_media
from megavlm.tiles import patch_rows


@dataclass
class Case:
    """One case of a file; what it does not hold is not compared."""

    input_ids: Tensor
    images: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    loss: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    attention_mask: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What else transformers' processor made."""


def read_cases(path: str | Path) -> dict[str, Case]:
    """All cases of a safetensors file, by name."""
    if not Path(path).is_file():
        raise DataError("--cases", str(path), "there is no such file", "give a safetensors file of cases")
    file = open_weight_file(Path(path))
    tensors = {name: file.read(name) for name in file.tensors}
    file.close()
    cases: dict[str, Case] = {}
    for name in sorted(tensors):
        if name.endswith(".input_ids"):
            cases[name.removesuffix(".input_ids")] = Case(tensors[name])
    for name, tensor in tensors.items():
        case, _, what = name.partition(".")
        if case not in cases:
            raise DataError(f"{path}: {name}", case, "is a case without input_ids", "add them, or drop the tensor")
        if what.startswith("grad."):
            cases[case].gradients[what.removeprefix("grad.")] = tensor
        elif what in ("input_ids", "images", "logits", "labels", "loss", "attention_mask"):
            setattr(cases[case], what, tensor)
        elif what in MEDIA_TENSORS:
            cases[case].tensors[what] = tensor
        else:
            raise DataError(f"{path}: {name}", what, "is nothing a case holds", "docs/verify.md has the format")
    return cases


def check_cases(cases: dict[str, Case], path: str | Path, run: RunConfig) -> None:
    """Refuse a file that proves nothing, or whose tensors are not of this model's shapes."""
    shapes = state_map_of(run).folder_shapes()
    for name, case in cases.items():
        _check_rows(case, f"{path}: {name}", run.decoder.vocab_size)
        if run.infimm is not None and case.images is not None and len(case.images) != len(case.input_ids):
            problem = f"{len(case.input_ids)} rows come with them"
            raise DataError(f"{path}: {name}.images: rows", len(case.images), problem, "record them anew")
        if run.aquila_vl is not None:
            check_media(case.tensors, len(case.input_ids), run.aquila_vl, f"{path}: {name}")
        shape = (*case.input_ids.shape, run.decoder.vocab_size)
        if case.logits is None and case.loss is None:
            raise DataError(f"{path}: {name}", None, "holds neither logits nor a loss to compare", "add one of them")
        if case.gradients and case.loss is None:
            raise DataError(f"{path}: {name}.loss", None, "is missing beside the gradients", "add it")
        if case.logits is not None and tuple(case.logits.shape) != shape:
            raise DataError(
                f"{path}: {name}.logits", tuple(case.logits.shape), f"should be {shape}", "record them anew"
            )
        for tensor, gradient in case.gradients.items():
            if shapes.get(tensor) != tuple(gradient.shape):
                problem = f"the model has {shapes.get(tensor, 'no such tensor')}"
                raise DataError(f"{path}: {name}.grad.{tensor}", tuple(gradient.shape), problem, "record it anew")
    if not cases:
        raise DataError(str(path), None, "holds no case", "give a file with tensors like NAME.input_ids")


def _check_rows(case: Case, where: str, vocabulary: int) -> None:
    """Refuse tokens, labels, a mask or a loss that are of no use."""
    shape = tuple(case.input_ids.shape)
    if len(shape) != 2 or 0 in shape:
        raise DataError(f"{where}.input_ids", shape, "should be [rows, length]", "record them anew")
    of_tokens = {"input_ids": case.input_ids, "labels": case.labels, "attention_mask": case.attention_mask}
    for what, tensor in of_tokens.items():
        if tensor is not None and (tuple(tensor.shape) != shape or not is_whole(tensor)):
            problem = f"should be {shape} whole numbers"
            raise DataError(f"{where}.{what}", (tuple(tensor.shape), str(tensor.dtype)), problem, "record them anew")
    for what, tensor in (("input_ids", case.input_ids), ("labels", case.labels)):
        counted = tensor if tensor is None or what == "input_ids" else tensor[tensor != IGNORED]
        if counted is not None and not bool(((counted >= 0) & (counted < vocabulary)).all()):
            problem = f"are not all within the vocabulary of {vocabulary}"
            raise DataError(f"{where}.{what}", int(counted.max()), problem, "take this model's cases")
    if case.attention_mask is not None and not case.attention_mask.any():
        raise DataError(f"{where}.attention_mask", 0, "leaves nothing to compare", "record it anew")
    if case.loss is not None and (case.loss.numel() != 1 or not 0 < float(case.loss) < math.inf):
        raise DataError(f"{where}.loss", case.loss.tolist(), "should be one positive number", "record it anew")


def case_batches(case: Case, run: RunConfig) -> list[TextBatch]:
    """One microbatch a row; repeated as often as the interleaved schedule needs, which changes no mean."""
    rows = case.input_ids.size(0)
    stages = run.parallel.pipeline_model_parallel_size
    batches = [_row_batch(case, run, row) for row in range(rows)]
    return batches * (math.lcm(rows, stages) // rows)


def _row_batch(case: Case, run: RunConfig, row: int) -> TextBatch:
    tokens = case.input_ids[row : row + 1].long()
    labels = tokens if case.labels is None else case.labels[row : row + 1].long()
    # Sequence parallelism cuts the row evenly; what is added on the right changes nothing to its left.
    missing = -tokens.size(1) % run.parallel.tensor_model_parallel_size
    tokens = torch.nn.functional.pad(tokens, (0, missing), value=0)
    labels = torch.nn.functional.pad(labels, (0, missing), value=IGNORED)
    if run.aquila_vl is not None:
        media = read_media(case.tensors, row, tokens, run.aquila_vl)
        return spliced_batch(tokens, labels, media.is_image, media.plans, media.patches)
    batch = next_token_batch(tokens, labels)
    if run.infimm is None:
        return batch
    given = case.images[row] if case.images is not None else None
    return replace(batch, media=_attended(tokens, given, run.infimm, row))


def _attended(tokens: Tensor, given: Tensor | None, parts: InfiMMConfig, row: int) -> AttendedMedia:
    tower = parts.tower
    tags = int((tokens == parts.image_token_id).sum())
    if given is None:
        given = torch.empty(0, 3, tower.image_size, tower.image_size)
    if tags > given.size(0):
        raise DataError(f"row {row}: tags of images", tags, f"only {given.size(0)} images come", "give the others too")
    if tuple(given.shape[1:]) != (3, tower.image_size, tower.image_size):
        size = (3, tower.image_size, tower.image_size)
        raise DataError(f"row {row}: images", tuple(given.shape[1:]), f"the tower takes {size}", "resize them")
    image_of_token, has_image = preceding_images(tokens, parts.image_token_id, [tags])
    patches = patch_rows(given[:tags], tower.patch_size)
    return AttendedMedia(patches, (1,) * tags, image_of_token=image_of_token, has_image=has_image)
