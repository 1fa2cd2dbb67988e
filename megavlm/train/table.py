"""The table of a run's model: what each part holds, what of it learns, and how fast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from megavlm.build.model import Model
from megavlm.build.run_config import OptimizerConfig
from megavlm.model.freeze import Part, part_of
from megavlm.parallel.groups import Groups
from megavlm.parallel.wrap import PARTS_OF_RATES


@dataclass(frozen=True)
class PartRow:
    """One part of the whole model, over all ranks."""

    part: Part
    parameters: int
    """With the rows that pad the vocabulary."""
    trained: int


def whole_parts(model: Model, groups: Groups) -> list[PartRow]:
    """The same on every rank, in the order in which data pass through; a collective."""
    everyone: list[dict[Part, tuple[int, int]]] = [{}] * groups.world_size
    dist.all_gather_object(everyone, _share(model, groups))
    totals: dict[Part, tuple[int, int]] = {}
    for share in everyone:
        for part, (parameters, trained) in share.items():
            before = totals.get(part, (0, 0))
            totals[part] = before[0] + parameters, before[1] + trained
    return [PartRow(part, *totals[part]) for part in sorted(totals, key=_ORDER.index)]


_ORDER: list[Part] = ["tower", "resampler", "projector", "newline", "cross_attention", "decoder", "new_tokens"]


def _share(model: Model, groups: Groups) -> dict[Part, tuple[int, int]]:
    """What this rank counts: slices times their number on one tensor-parallel rank, copies once."""
    found: dict[Part, tuple[int, int]] = {}
    if groups.data_rank > 0 or groups.tensor_rank > 0:
        return found
    # Where all stages encode, each holds the tower; the first one speaks for it.
    parts = model.parts() if groups.pipeline_rank == 0 else model.chunks
    for name, parameter in _once(parts):
        slices = groups.collection.tp.size() if getattr(parameter, "tensor_model_parallel", False) else 1
        number = slices * parameter.numel()
        parameters, trained = found.get(part_of(name), (0, 0))
        found[part_of(name)] = parameters + number, trained + number * parameter.requires_grad
    return found


def _once(parts: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters but the last stage's copy of a tied embedding, which megatron-core marks."""
    for part in parts:
        for name, parameter in part.named_parameters():
            if not getattr(parameter, "shared", False):
                yield name, parameter


def table(rows: list[PartRow], optimizer: OptimizerConfig) -> str:
    """As text, with the highest learning rate of each part."""
    lines = [("part", "parameters", "trained", "learning rate")]
    for row in rows:
        rate = f"{_rate(row.part, optimizer):g}" if row.trained else "frozen"
        lines.append((row.part, f"{row.parameters:,}", f"{row.trained:,}", rate))
    parameters, trained = sum(row.parameters for row in rows), sum(row.trained for row in rows)
    lines.append(("all", f"{parameters:,}", f"{trained:,}", ""))
    return "\n".join(f"{part:<16}{count:>16}{learning:>16}  {rate}".rstrip() for part, count, learning, rate in lines)


def _rate(part: Part, optimizer: OptimizerConfig) -> float:
    for name, (highest, _) in optimizer.rates.items():
        if part in PARTS_OF_RATES[name]:
            return highest
    return optimizer.lr
