"""The scales of FP8's delayed recipe, which Transformer Engine's layers keep beside their weights.

A layer hands them over by `get_extra_state`, as the bytes of a pickle, and unpickles whatever `set_extra_state` gets.
So a checkpoint holds what is in them, tensors and plain values, which no reader has to unpickle; each rank keeps its
own, for they need not be equal anywhere. A layer gets a pickle that this process has just made.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.checkpoint.hf_import import names_in_whole
from megavlm.checkpoint.restricted_pickle import extra_state_bytes, extra_state_values
from megavlm.checkpoint.state import TrainState
from megavlm.checkpoint.stored_tensors import StoredTensors
from megavlm.errors import CheckpointError
from megavlm.log import get_logger
from megavlm.parallel.agree import agreed

logger = get_logger(__name__)

_SETTINGS = ("fp8", "fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
_ALLOW_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Without it Transformer Engine from 2.17.1 on refuses each pickle of scales, whoever made it."""
_REMEDY = "take another checkpoint"


@dataclass(frozen=True)
class SavedScales:
    """Those of this rank in a checkpoint, or why it cannot take them."""

    layers: Mapping[str, Mapping[str, Any]]
    why_not: str | None = None


def keeps_scales(config: TransformerConfig) -> bool:
    """Whether layers have scales that outlive a step: other recipes find theirs in each tensor anew."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def scales_key(rank: int) -> str:
    """What checkpoints call the scales of a rank."""
    return f"fp8_scales.{rank}"


def scales_to_save(state: TrainState) -> Tensor | None:
    """All that this rank's layers keep, as bytes; None in runs that keep none."""
    config = _config(state)
    if not keeps_scales(config):
        return None
    layers = {}
    for name, module in _layers(state.parts).items():
        found = module.get_extra_state()
        if isinstance(found, Tensor) and found.numel() > 0:
            layers[name] = extra_state_values(found.detach().cpu().numpy().tobytes(), name)
    content = io.BytesIO()
    torch.save({"settings": _settings(config), "layers": layers}, content)
    return torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)


def read_scales(state: TrainState, folder: Path, same_place: bool) -> SavedScales | None:
    """This rank's scales in a verified checkpoint; None in runs that keep none. No layer is touched."""
    config = _config(state)
    if not keeps_scales(config):
        return None
    stored, key = StoredTensors(folder), scales_key(state.groups.rank)
    if scales_key(0) not in stored:
        return SavedScales({}, "the checkpoint holds none")
    if not same_place or key not in stored:
        return SavedScales({}, "the checkpoint is of another layout")
    content = stored.read(key, 0, 0, stored.shape(key)[0])
    settings, layers = _unpacked(content, f"{folder}: {key}")
    if settings != _settings(config):
        return SavedScales({}, "the checkpoint is of other settings of FP8")
    if not layers.keys() <= _layers(state.parts).keys():
        return SavedScales({}, "the checkpoint is of another layout")
    return SavedScales(layers)


def restore_scales(state: TrainState, saved: SavedScales | None) -> None:
    """Hand the scales to the layers where all ranks can take theirs, and say so where they start anew."""
    if saved is None:
        return
    reasons: list[str | None] = [None] * state.groups.world_size
    dist.all_gather_object(reasons, saved.why_not)
    why_not = next((reason for reason in reasons if reason is not None), None)
    if why_not is not None:
        logger.info("the scales of FP8 start anew: %s", why_not)
        return
    recipe, layers = get_fp8_recipe(_config(state)), _layers(state.parts)
    with agreed(), _own_pickles_allowed():
        for name, values in saved.layers.items():
            content = bytearray(extra_state_bytes(values, recipe))
            try:
                layers[name].set_extra_state(torch.frombuffer(content, dtype=torch.uint8))
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise _no_scales(f"the scales of {name}", error) from error


@contextlib.contextmanager
def scales_kept(parts: Sequence[nn.Module], config: TransformerConfig) -> Iterator[None]:
    """Leave the scales as they were: passes without gradients would widen the ranges that the next step finds."""
    layers = [layer for layer in _layers(parts).values() if hasattr(layer, "get_fp8_meta_tensors")]
    if not keeps_scales(config) or not layers:
        yield
        return
    before = [layer.get_fp8_meta_tensors() for layer in layers]  # None in layers that have not worked in FP8 yet
    yield
    for layer, tensors in zip(layers, before, strict=True):
        layer.reset_fp8_meta_tensors(tensors)


def _config(state: TrainState) -> TransformerConfig:
    config: TransformerConfig = state.chunks[0].config
    return config


def _settings(config: TransformerConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SETTINGS}


def _layers(parts: Sequence[nn.Module]) -> dict[str, Any]:
    """The modules that may keep something beside weights, by their names in the whole model."""
    found: dict[str, Any] = {}
    for part in parts:
        name_in_whole = names_in_whole(part)
        found |= {
            name_in_whole(name): module
            for name, module in part.named_modules()
            if type(module).set_extra_state is not nn.Module.set_extra_state
        }
    return found


def _unpacked(content: Tensor, where: str) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]:
    try:
        found = torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no such file raise whatever they happen to call for
        raise _no_scales(where, error) from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("settings", "layers")):
        raise CheckpointError(where, type(found).__name__, "holds no scales of FP8", _REMEDY)
    return found["settings"], found["layers"]


def _no_scales(where: str, error: Exception) -> CheckpointError:
    called = re.search(r"GLOBAL ([\w.]+)", str(error))  # what torch refuses to call
    words = called[1] if called else next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError(where, words, "cannot be taken as scales of FP8", _REMEDY)


@contextlib.contextmanager
def _own_pickles_allowed() -> Iterator[None]:
    before = os.environ.get(_ALLOW_PICKLES)
    os.environ[_ALLOW_PICKLES] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ALLOW_PICKLES]
        else:
            os.environ[_ALLOW_PICKLES] = before
