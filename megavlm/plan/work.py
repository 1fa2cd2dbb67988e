"""What one operation of torch costs: floating-point operations, bytes, and what is sent, from its arguments alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from megavlm.plan.profile import CommOp, GroupName, Kind

aten = torch.ops.aten

_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}
_ATTENTION_BACKWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
}
_READS_ROWS = {aten.embedding, aten.index_select, aten.index, aten.gather}
"""Of their first argument they read as much as they give."""
_ALLOCATES_ONLY = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
_BACKWARD_OVER_FORWARD = 2.5
"""Flash attention's backward makes five products of the scores' size, its forward two."""


class Work(NamedTuple):
    """What an operation costs."""

    kind: Kind
    flops: float
    bytes: float


class Message(NamedTuple):
    """What a collective moves."""

    op: CommOp
    group: str
    """The process group's name."""
    bytes: int


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments or results, lists of them included."""
    found: list[Tensor] = []
    for value in values if isinstance(values, list | tuple) else (values,):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def work_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: list[Tensor], out: Any) -> Work:
    """The cost of an operation that is no view and no message."""
    packet = func.overloadpacket
    outputs = tensors_in(out)
    if packet in _ATTENTION:
        return Work(
            "attention",
            _attention(args[0], args[1], args[2], _is_causal(func, args, kwargs)),
            _bytes([*inputs, *outputs]),
        )
    if packet in _ATTENTION_BACKWARD:
        flops = _BACKWARD_OVER_FORWARD * _attention(args[1], args[2], args[3], _is_causal(func, args, kwargs))
        return Work("attention", flops, _bytes([*inputs, *outputs]))
    if packet in flop_registry:
        return Work("matmul", flop_registry[packet](*args, **kwargs, out_val=out), _bytes([*inputs, *outputs]))
    if packet in _ALLOCATES_ONLY:
        return Work("memory", 0, 0)
    if packet in _READS_ROWS:
        return Work("memory", 0, 2 * _bytes(outputs) + _bytes(inputs[1:]))
    return Work("memory", 0, _bytes([*inputs, *outputs, *([] if outputs else _written(func, args))]))


def _written(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """What an operation writes that gives nothing back: its arguments, lists of them."""
    named = zip(func._schema.arguments, args, strict=False)
    return [tensor for argument, value in named if _is_written(argument) for tensor in tensors_in(value)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> float:
    """Both products, [b, heads, s, d] by [b, groups, t, d]; of a causal mask the half that is seen."""
    batch, heads, length, width = query.shape
    seen = (length + 1) / 2 if causal else key.size(2)
    return 2.0 * batch * heads * length * seen * (width + value.size(3))


def _is_causal(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if "is_causal" in kwargs:
        return bool(kwargs["is_causal"])
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("is_causal")
    return bool(args[place]) if place < len(args) else False


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- messages -----------------------------------------------------------------------------------------------------

_COLLECTIVES: dict[str, tuple[CommOp, int]] = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("p2p", 0),
    "alltoall_base_": ("all_to_all", 1),
}
"""torch's name -> ours, and which argument is the whole message."""


def is_message(func: Any) -> bool:
    """Whether the operation is one of torch.distributed."""
    return bool(func.namespace == "c10d")


def message_of(func: Any, args: Sequence[Any]) -> Message | None:
    """The whole message of a collective, or what is sent; none where this rank sends nothing or is alone."""
    known = _COLLECTIVES.get(func.overloadpacket.__name__)
    group = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
    if known is None or group is None:
        return None
    op, place = known
    unboxed = dist.ProcessGroup.unbox(group)
    if unboxed.size() == 1:
        return None
    return Message(op, unboxed.group_name, _bytes(tensors_in(args[place])))


def group_names(groups: Mapping[GroupName, Sequence[Any]]) -> dict[str, GroupName]:
    """Process groups' own names -> ours, the first that claims one."""
    found: dict[str, GroupName] = {}
    for name, members in groups.items():
        for group in members:
            if group is not None:
                found.setdefault(group.group_name, name)
    return found
