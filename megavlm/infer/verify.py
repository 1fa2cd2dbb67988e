"""How far our model, under a layout, is from what the public implementation computed: the proof of a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavlm.batch import TextBatch
from megavlm.build.families import state_map_of
from megavlm.build.model import Model
from megavlm.build.run_config import DataParallelConfig, RunConfig
from megavlm.checkpoint.hf_import import named_parameters
from megavlm.export.hf_export import folder_tensors
from megavlm.infer.cases import Case, case_batches
from megavlm.infer.logits import compute_logits
from megavlm.parallel.agree import agreed
from megavlm.parallel.groups import Groups
from megavlm.parallel.schedule import forward_backward
from megavlm.parallel.wrap import wrap_data_parallel

LOGITS_TOLERANCE = 1e-4
"""Absolute, for logits of order 1 in float32."""
LOSS_TOLERANCE = 1e-5
"""Relative."""
GRADIENT_TOLERANCE = 1e-4
"""Of the gradient's own norm, or of a thousandth of the norm of all where that is more."""


@dataclass(frozen=True)
class Deviation:
    """One comparison: how far off, and how far it may be."""

    case: str
    what: str
    off: float
    allowed: float

    @property
    def is_fine(self) -> bool:
        return self.off <= self.allowed  # a NaN is not


def verify(model: Model, run: RunConfig, groups: Groups, cases: dict[str, Case]) -> list[Deviation]:
    """Every case through the model; all ranks return all deviations."""
    # Without the distributed optimizer every rank holds the whole reduced gradient.
    chunks = wrap_data_parallel(list(model.chunks), DataParallelConfig(use_distributed_optimizer=False))
    with agreed():
        batches = {name: case_batches(case, run) for name, case in cases.items()}
    found = [
        one
        for name, case in cases.items()
        for one in _verify_case(
            name, case, [batch.to(groups.device) for batch in batches[name]], model, chunks, run, groups
        )
    ]
    everyone: list[list[Deviation]] = [[] for _ in range(groups.world_size)]
    dist.all_gather_object(everyone, found)
    return [deviation for rank in everyone for deviation in rank]


def _verify_case(
    name: str,
    case: Case,
    batches: list[TextBatch],
    model: Model,
    chunks: Sequence[nn.Module],
    run: RunConfig,
    groups: Groups,
) -> list[Deviation]:
    """What this rank found; only the first copy of the model speaks, and in it the first rank of each stage."""
    found: list[Deviation] = []
    if case.logits is not None:
        logits = compute_logits(chunks, batches, groups, run.decoder.vocab_size, model.inputs)
        if groups.speaks:
            rows, length = case.input_ids.shape
            read = torch.ones(rows, length) if case.attention_mask is None else case.attention_mask
            mine = torch.cat(logits[:rows])[:, :length].cpu().double()
            off = (mine - case.logits.double())[read.bool()].abs().max()
            found.append(Deviation(name, "logits", off.item(), LOGITS_TOLERANCE))
    if case.loss is not None:
        loss = forward_backward(chunks, batches, groups, model.inputs).loss
        if groups.speaks:
            theirs = case.loss.double().item()
            found.append(Deviation(name, "loss", abs(loss - theirs) / abs(theirs), LOSS_TOLERANCE))
        found.extend(_gradients(name, case, chunks, run, groups))
    return found


def _gradients(name: str, case: Case, chunks: Sequence[nn.Module], run: RunConfig, groups: Groups) -> list[Deviation]:
    trained = [chunk for chunk in chunks if any(parameter.requires_grad for parameter in chunk.parameters())]
    if not case.gradients:
        return []
    whole = torch.stack([gradient.double().norm() for gradient in case.gradients.values()]).norm()
    state_map = state_map_of(run)
    frozen = {name for chunk in trained for name, parameter in named_parameters(chunk) if not parameter.requires_grad}
    without = {theirs for entry in state_map.entries if entry.ours in frozen for theirs in entry.theirs}
    found = []
    for tensor_name, mine in folder_tensors(trained, state_map, groups.collection.tp, _gradient):
        if tensor_name in case.gradients and tensor_name not in without and groups.holds_first_copy:
            theirs = case.gradients[tensor_name].double()
            off = (mine.cpu().double() - theirs).norm() / torch.maximum(theirs.norm(), 1e-3 * whole)
            found.append(Deviation(name, f"gradient of {tensor_name}", off.item(), GRADIENT_TOLERANCE))
    return found


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros for a frozen parameter: it has no gradient buffer, and they are compared with nothing."""
    gradient: Tensor = parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)  # type: ignore[attr-defined]
    return gradient


def table(deviations: Sequence[Deviation]) -> str:
    """The largest deviation of each kind in each case, one a line."""
    worst: dict[tuple[str, str], Deviation] = {}
    for deviation in deviations:
        key = (deviation.case, deviation.what.split(" ")[0])
        if key not in worst or not deviation.off <= worst[key].off:
            worst[key] = deviation
    width = max(len(case) for case, _ in worst)
    return "\n".join(
        f"{case:<{width}}  {kind:<8}  {one.off:.2e}  allowed {one.allowed:.0e}  "
        f"{'ok' if one.is_fine else 'TOO FAR'}{'' if kind == one.what else f'  ({one.what})'}"
        for (case, kind), one in worst.items()
    )


def as_json(deviations: Sequence[Deviation]) -> list[dict[str, object]]:
    """Plain data, for `--json`."""
    return [{**asdict(deviation), "ok": deviation.is_fine} for deviation in deviations]
