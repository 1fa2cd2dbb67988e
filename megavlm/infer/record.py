"""Cases made on the spot: random inputs, and what transformers' own model computes from them."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessorPil

from megavlm.batch import IGNORED
from megavlm.build.families import model_of_folder
from megavlm.build.run_config import AquilaVLConfig, RunConfig
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.data.tile_images import MEAN, STD
from megavlm.errors import ConfigError
from megavlm.model.aquila_vl.config import TRANSFORMERS
from megavlm.parallel.agree import agreed
from megavlm.tiles import GridConfig, MediaKind, token_counts

Inputs = dict[str, Tensor]
_TEXT = 12
"""Tokens of text between, before and behind the images of a row."""


@contextmanager
def recorded_cases(run: RunConfig, rank: int, save_as: str | None, seed: int) -> Iterator[str]:
    """A file of cases that the first rank records and all read; it goes at the end, unless it is given a name."""
    with tempfile.TemporaryDirectory() as place:
        file = [save_as or f"{place}/cases.safetensors"]
        dist.broadcast_object_list(file, src=0)
        with agreed():
            if rank == 0:
                record_cases(run, Path(file[0]), seed)
        yield file[0]
        dist.barrier()


def record_cases(run: RunConfig, file: Path, seed: int = 1234) -> None:
    """Let transformers' model of the run's folder compute random cases, and write them as a file of cases.

    With images: one of an odd size alone, several in a row, none, a video where the model takes such, and a batch that
    mixes them. In float32, all gradients included, so the model's weights are held twice.
    """
    if not os.access(file.parent, os.W_OK):  # told before hours of computing
        raise _unwritable(file, "there is no such folder, or it may not be written to")
    model = _load(run)
    weights = dict(_named_weights(model, run))
    tensors: Inputs = {}
    for name, inputs in _random_inputs(run, random.Random(seed)):
        recorded = {**inputs, **_compute(model, weights, inputs)}
        tensors |= {f"{name}.{what}": tensor.contiguous() for what, tensor in recorded.items()}
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # what it calls a full disk
        raise _unwritable(file, str(error)) from error


def _unwritable(file: Path, problem: str) -> ConfigError:
    return ConfigError("--save-cases", str(file), f"cannot be written: {problem}", "give another place")


def _load(run: RunConfig) -> Any:
    if run.infimm is not None:
        raise ConfigError(
            "--against",
            "transformers",
            "would run the code of InfiMM's folder",
            "record cases with it, and use --cases",
        )
    if run.weights.load_hf is None:
        remedy = "make a folder with `megavlm export-hf`, and name it by --hf"
        raise ConfigError("--against", "transformers", "needs a Hugging Face folder", remedy)
    kind: Any = AutoModelForCausalLM
    if run.aquila_vl is not None:
        kind = LlavaOnevisionForConditionalGeneration
        _check_readable(run.weights.load_hf, run.aquila_vl.grid)
    return kind.from_pretrained(run.weights.load_hf, dtype=torch.float32, attn_implementation="eager").eval()


def _check_readable(path: str, grid: GridConfig) -> None:
    """Refuse a folder for which transformers would make up a model, and images cut otherwise than by the folder."""
    with HFFolder.open(path) as folder:
        if folder.config.get("model_type") != TRANSFORMERS:
            problem = f"cannot read LLaVA-NeXT's layout, that of {path}"
            remedy = "record cases of the transformers layout with --save-cases, and use --cases"
            raise ConfigError("--against", "transformers", problem, remedy)
        found = model_of_folder(folder).aquila_vl
    assert found is not None
    # A model of single tiles is read as one of grids of one tile.
    one = {"tiling": "grid", "max_tiles_per_side": 1, "cap_tiles": 1}
    theirs = found.grid.replace(**one) if found.grid.tiling == "single" else found.grid
    if grid != theirs:
        side, cap = theirs.max_tiles_per_side, theirs.cap_tiles
        written = f"aquila_vl.grid.tiling=grid aquila_vl.grid.max_tiles_per_side={side} aquila_vl.grid.cap_tiles={cap}"
        problem = "is not how transformers cuts the images of this folder"
        raise ConfigError("aquila_vl.grid", grid.to_dict(), problem, f"add {written}, or use --cases")


def _random_inputs(run: RunConfig, draw: random.Random) -> Iterator[tuple[str, Inputs]]:
    if run.aquila_vl is None:
        noise = torch.Generator().manual_seed(draw.getrandbits(32))
        yield "text", _padded([_text(run, draw, length) for length in (4 * _TEXT, _TEXT)], noise)
        return
    parts = run.aquila_vl
    size = parts.tower.image_size
    sizes = [(draw.randint(1, 5 * size), draw.randint(1, 5 * size)) for _ in range(4)]
    yield "image", random_rows(run, draw, [[sizes[0]]])
    yield "thin image", random_rows(run, draw, [[(draw.randint(3 * size, 6 * size), 1)]])
    yield "several images", random_rows(run, draw, [sizes[1:]])
    yield "text", random_rows(run, draw, [[]])
    yield "video", random_rows(run, draw, [[]], frames=[3])
    yield "mixed batch", random_rows(run, draw, [[sizes[3]], [], sizes[:2]], frames=[0, 2, 0])


def random_rows(
    run: RunConfig, draw: random.Random, images: list[list[tuple[int, int]]], frames: list[int] | None = None
) -> Inputs:
    """A batch whose rows hold images of these sizes (width, height), and each a video of so many frames."""
    parts = run.aquila_vl
    assert parts is not None
    rows = [
        _row(run, parts, draw, sizes, of_video)
        for sizes, of_video in zip(images, frames or [0] * len(images), strict=True)
    ]
    noise = torch.Generator().manual_seed(draw.getrandbits(32))
    inputs = _padded(rows, noise)
    if any(images):
        inputs |= _pixels(parts, draw, images)
        inputs["batch_num_images"] = torch.tensor([len(sizes) for sizes in images])
    if frames and any(frames):
        size = parts.tower.image_size
        inputs["pixel_values_videos"] = torch.stack(
            [torch.rand(count, 3, size, size, generator=noise) * 2 - 1 for count in frames if count]
        )
        inputs["batch_num_videos"] = torch.tensor([int(count > 0) for count in frames])
    return inputs


def _row(
    run: RunConfig, parts: AquilaVLConfig, draw: random.Random, sizes: list[tuple[int, int]], frames: int
) -> list[int]:
    row = _text(run, draw, _TEXT)
    kind: MediaKind = "image" if len(sizes) == 1 else "one_of_several"
    for width, height in sizes:
        row += [parts.image_token_id] * int(token_counts(width, height, kind, parts.grid)[0])
        row += _text(run, draw, draw.randint(1, _TEXT))
    if frames:
        row += [parts.video_token_id] * int(token_counts(1, 1, "video", parts.grid, frames)[0])
        row += _text(run, draw, _TEXT)
    return row


def _text(run: RunConfig, draw: random.Random, length: int) -> list[int]:
    tags = () if run.aquila_vl is None else (run.aquila_vl.image_token_id, run.aquila_vl.video_token_id)
    words = [token for token in range(min(run.decoder.vocab_size, 100_000)) if token not in tags]
    return draw.choices(words, k=length)


def _padded(rows: list[list[int]], noise: torch.Generator) -> Inputs:
    """Rows of one length, and labels that train about two thirds of the text."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    trained = (mask == 1) & (torch.rand(tokens.shape, generator=noise) < 2 / 3)
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.where(trained, tokens, IGNORED)}


def _pixels(parts: AquilaVLConfig, draw: random.Random, images: list[list[tuple[int, int]]]) -> Inputs:
    """What transformers' image processor makes of random pictures."""
    noise = np.random.default_rng(draw.getrandbits(32))
    size = parts.tower.image_size
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": size, "width": size},
        image_grid_pinpoints=[list(resolution) for resolution in parts.grid.resolutions],
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    pictures = [
        [noise.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
        for sizes in images
        if sizes
    ]
    # Said, since a picture three pixels high would be taken for one of three channels.
    made = processor(pictures, return_tensors="pt", input_data_format="channels_last")
    return {"pixel_values": made["pixel_values"], "image_sizes": made["image_sizes"]}


def _compute(model: Any, weights: dict[str, Tensor], inputs: Inputs) -> Inputs:
    for weight in weights.values():
        weight.grad = None
    given = {name: tensor for name, tensor in inputs.items() if name != "batch_num_videos"}
    output = model(**given)
    output.loss.backward()
    gradients = {f"grad.{name}": weight.grad for name, weight in weights.items() if weight.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach().reshape(1), **gradients}


def _named_weights(model: Any, run: RunConfig) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under the names of our table."""
    for name, parameter in model.named_parameters():
        yield (name if run.aquila_vl is None else _on_disk(name)), parameter


def _on_disk(name: str) -> str:
    """The name in a folder of what is called differently at run time; a table of ours would only check itself."""
    for runtime, disk in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if name.startswith(runtime):
            return disk + name.removeprefix(runtime)
    return name
