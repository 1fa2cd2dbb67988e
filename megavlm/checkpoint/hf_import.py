"""Weights from a Hugging Face folder (or fresh ones by name) into the shards that this process holds.

Each rank reads only its own rows and columns, one tensor at a time, so the memory needed is the shard and one tensor.
Shapes are checked over the whole folder before the first weight is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megavlm.errors import WeightsError
from megavlm.model.decoder.spec import FUSED_NORM_NAMES
from megavlm.model.decoder.state_map import IGNORED_SUFFIXES
from megavlm.model.state_map import Block, Entry, StateMap

_TABLE_TOLERANCE = 2**-8  # released folders hold their tables, of values up to 1, in bfloat16


class WeightSource(Protocol):
    """Named tensors that can be read in part."""

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...
    def read_rows(self, name: str, start: int, stop: int) -> Tensor: ...
    def read_columns(self, name: str, start: int, stop: int) -> Tensor: ...


def check_folder(
    source: WeightSource,
    state_map: StateMap,
    where: str,
    prefix: str = "",
    unused: Callable[[str], bool] = lambda name: False,
) -> None:
    """Refuse a folder whose tensors, of those with names under the prefix, are not exactly those of the model.

    `unused` says of a name whether the model is known to go without it (parts of a published tower).
    """
    expected = state_map.folder_shapes()
    found = {name for name in source.names() if name.startswith(prefix) and not name.endswith(IGNORED_SUFFIXES)}
    found -= {name for name in found if unused(name)}
    constants, copies = found & state_map.constants.keys(), found & state_map.copies.keys()
    found -= constants | copies
    if missing := [name for name in expected if name not in found]:
        raise WeightsError(
            where, missing[0], f"{len(missing)} of {len(expected)} tensors are missing", "take a complete folder"
        )
    if unknown := sorted(found - expected.keys()):
        raise WeightsError(
            where, unknown[0], f"{len(unknown)} tensors have no place in this model", "check model_type in config.json"
        )
    for name, shape in expected.items():
        _check_shape(source, name, shape, where)
    for name in sorted(copies):
        _check_copy(source, name, state_map.copies[name], where)
    for name in sorted(constants):
        _check_constant(source, name, state_map.constants[name], where)


def _check_copy(source: WeightSource, name: str, original: str, where: str) -> None:
    """With tied embeddings a folder may store the output layer as well, but not another one."""
    if source.shape(name) != source.shape(original) or not torch.equal(source.read(name), source.read(original)):
        raise WeightsError(
            where,
            name,
            f"differs from {original}, although config.json says tie_word_embeddings",
            "set tie_word_embeddings to false if the output layer was trained apart",
        )


def _check_shape(source: WeightSource, name: str, shape: tuple[int, ...], where: str) -> None:
    if source.shape(name) != shape:
        raise WeightsError(
            f"{where}: {name}",
            source.shape(name),
            f"the model needs the shape {shape}",
            "take the folder that belongs to this config.json",
        )


def _check_constant(source: WeightSource, name: str, constant: Tensor, where: str) -> None:
    """Refuse a stored table that differs from ours by more than rounding."""
    _check_shape(source, name, tuple(constant.shape), where)
    farthest = (source.read(name).float() - constant).abs().max().item()
    # Written this way round, a NaN is refused as well.
    if not farthest <= _TABLE_TOLERANCE:
        raise WeightsError(
            f"{where}: {name}",
            farthest,
            "is its distance from the table that the model's settings give",
            "take the folder that belongs to this config.json",
        )


@torch.no_grad()
def load_weights(
    chunks: Iterable[nn.Module], source: WeightSource, state_map: StateMap, tensor_rank: int, tensor_size: int
) -> None:
    """Fill every parameter of these pipeline chunks; the folder must have been checked."""
    entries = {entry.ours: entry for entry in state_map.entries}
    tied_output = entries.get("embedding.word_embeddings.weight")
    for name, parameter in (pair for chunk in chunks for pair in named_parameters(chunk)):
        if getattr(parameter, "beside_vocabulary", False):
            continue  # rows of the vocabulary that learn apart: taken from it once it is filled
        # With tied embeddings the last stage holds a second copy of the embedding under the output layer's name.
        entry = entries.get(name, tied_output if name == "output_layer.weight" else None)
        assert entry is not None, f"{name} stands in no row of the state map"
        _fill(parameter, entry, source, state_map, tensor_rank, tensor_size)


def _fill(
    parameter: Tensor, entry: Entry, source: WeightSource, state_map: StateMap, rank: int, tensor_size: int
) -> None:
    if entry.split == "whole":
        _fill_rows(parameter, entry, source, state_map, rank=0, tensor_size=1)
    elif entry.split == "columns":
        (name,) = entry.theirs
        width = parameter.size(1)
        parameter.copy_(source.read_columns(name, rank * width, (rank + 1) * width))
    else:
        _fill_rows(parameter, entry, source, state_map, rank, tensor_size)


def _fill_rows(
    parameter: Tensor, entry: Entry, source: WeightSource, state_map: StateMap, rank: int, tensor_size: int
) -> None:
    """Copy this rank's rows, each of the tensors they come from read once: its rows in a shard are neighbours."""
    first = rank * parameter.size(0)
    blocks, filled = _blocks_within(state_map.blocks(entry, tensor_size), first, first + parameter.size(0))
    for name in entry.theirs:
        mine = [(at, block) for at, block in blocks if block.source == name]
        if not mine:
            continue
        start = min(block.start for _, block in mine)
        rows = source.read_rows(name, start, max(block.start + block.count for _, block in mine))
        if entry.flattened:
            rows = rows.flatten(1)
        for at, block in mine:
            parameter[at : at + block.count].copy_(rows[block.start - start : block.start - start + block.count])
    assert filled == parameter.size(0) or entry.padded, f"{entry.ours}: {filled} of {parameter.size(0)} rows"
    parameter[filled:].zero_()


def _blocks_within(blocks: Sequence[Block], first: int, last: int) -> tuple[list[tuple[int, Block]], int]:
    """The parts of the blocks that fall on the rows [first, last), each with its place there; and the rows filled."""
    within, top = [], 0
    for block in blocks:
        start, stop = max(first, top), min(last, top + block.count)
        if start < stop:
            within.append((start - first, Block(block.source, block.start + start - top, stop - start)))
        top += block.count
    return within, max(min(last, top) - first, 0)


def named_parameters(chunk: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """The chunk's parameters under the names of the state map: layers by their number in the whole model, norms apart.

    Transformer Engine holds a norm inside the layer behind it.
    """
    name_in_whole = names_in_whole(chunk)
    fused = {theirs: ours for ours, theirs in FUSED_NORM_NAMES.items()}
    for name, parameter in chunk.named_parameters():
        name = name_in_whole(name)
        if ".layers." in f".{name}":
            for inside, apart in fused.items():
                name = name.replace(inside, apart)
        yield name, parameter


def names_in_whole(chunk: nn.Module) -> Callable[[str], str]:
    """What the whole model calls that which has a name in this chunk, which numbers its layers from 0."""
    layers = {
        name: module.layer_number - 1
        for name, module in chunk.named_modules()
        if isinstance(getattr(module, "layer_number", None), int) and name.rpartition(".")[2].isdecimal()
    }

    def name_in_whole(name: str) -> str:
        for prefix, number in layers.items():
            if name.startswith(prefix + "."):
                name = f"{prefix.rpartition('.')[0]}.{number}.{name[len(prefix) + 1 :]}"
                break
        return name.removeprefix("module.")

    return name_in_whole
