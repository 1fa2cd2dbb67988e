"""The CPU adapter: lets unmodified megatron-core train on CPU processes over gloo.

megatron-core names CUDA in three ways, and each has one answer here:

1. It calls functions that raise where there is no CUDA (`torch.cuda.current_device`, `Tensor.cuda`, ...). They are
   replaced by what they mean on a CPU: `_TORCH_CUDA` lists each with its reason. Nothing else of torch is touched, so
   plain torch code costs what it cost before.
2. It writes CUDA into literals: `device="cuda"`, `param.type() == "torch.cuda.FloatTensor"`. In the modules of
   `_MODULES_WITH_LITERALS` those constants are replaced inside the compiled functions. This holds inside `backward`
   too (recompute), where a `TorchFunctionMode` is off, and costs nothing when a function runs.
3. It keeps a generator per GPU for dropout under tensor parallelism, and recompute asks Transformer Engine about FP8.
   `_RNG` maps those few names to the one CPU generator and to "no FP8".

A fourth part changes no result: where megatron-core relies on what CUDA's libraries do for free, `_FASTER` does the
same at a CPU's price.

Nothing here is imported on a machine with CUDA.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

_installed = False


def install() -> None:
    """Install the adapter in this process; a second call does nothing."""
    global _installed
    if _installed:
        return
    assert not torch.cuda.is_available(), "the CPU adapter must not be installed beside CUDA"
    for name, replacement in _TORCH_CUDA.items():
        setattr(torch.cuda, name, replacement)
    # Calls that raise otherwise: the second copy of a tied embedding is moved "to the GPU", and so are loss scales.
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    _without_compiler()
    for name in _MODULES_WITH_LITERALS:
        _rewrite_module(importlib.import_module(name))
    rng = importlib.import_module("megatron.core.tensor_parallel.random")
    for name, replacement in _RNG.items():
        setattr(rng, name, replacement)
    for module_name, replacements in _FASTER.items():
        for name, replacement in replacements.items():
            setattr(importlib.import_module(module_name), name, replacement)
    _installed = True


# --- 1. torch.cuda functions that raise without CUDA ----------------------------------------------------------------

_CPU = torch.device("cpu")

_TORCH_CUDA: dict[str, Callable[..., Any]] = {
    # Passed as `device=` by buffers, receive buffers and gathers all over megatron-core.
    "current_device": lambda: _CPU,
    # Called around point-to-point receives, and by the timers: a CPU has nothing outstanding.
    "synchronize": lambda device=None: None,
    # model_parallel_cuda_manual_seed seeds "the GPU" with it.
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    # The RNG tracker saves and restores "the GPU's" state around each seed it adds.
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
}


# --- 2. CUDA in literals --------------------------------------------------------------------------------------------

_MODULES_WITH_LITERALS = (
    "megatron.core.pipeline_parallel.schedules",  # the token counter: zeros(..., device="cuda")
    "megatron.core.optimizer.optimizer",  # found_inf and scale buffers; param.type() against torch.cuda.*Tensor
    "megatron.core.optimizer.distrib_optimizer",  # param.type() against torch.cuda.*Tensor
    "megatron.core.optimizer.clip_grads",  # norm buffers; grad.type() == "torch.cuda.FloatTensor"
    "megatron.core.optimizer.grad_scaler",  # loss-scale buffers
    "megatron.core.distributed.param_and_grad_buffer",  # a warm-up buffer of registered communication
    "megatron.core.transformer.utils",  # masks built with device="cuda"
    "megatron.core.utils",  # the norm that stands in for the multi-tensor kernel
)

_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def _on_cpu(constant: Any) -> Any:
    """The constant with CUDA names replaced, in nested tuples and nested functions as well."""
    if isinstance(constant, str):
        return _LITERALS.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(map(_on_cpu, constant))
    if isinstance(constant, types.CodeType):
        return constant.replace(co_consts=tuple(map(_on_cpu, constant.co_consts)))
    return constant


def _rewrite_function(function: types.FunctionType) -> None:
    function.__code__ = _on_cpu(function.__code__)
    if function.__defaults__:
        function.__defaults__ = tuple(map(_on_cpu, function.__defaults__))


def _functions_of(namespace: Any, module_name: str) -> Iterator[types.FunctionType]:
    """Every function defined in the module: plain, decorated, and in its classes (properties included)."""
    for member in list(vars(namespace).values()):
        if inspect.isclass(member):
            if member.__module__ == module_name:
                yield from _functions_of(member, module_name)
            continue
        # A static or class method holds its function; a property holds two.
        held = (member.fget, member.fset) if isinstance(member, property) else (getattr(member, "__func__", member),)
        for function in map(inspect.unwrap, filter(callable, held)):
            if isinstance(function, types.FunctionType) and function.__module__ == module_name:
                yield function


def _rewrite_module(module: types.ModuleType) -> None:
    for function in _functions_of(module, module.__name__):
        _rewrite_function(function)


def _without_compiler() -> None:
    """Keep megatron-core's small fused functions eager.

    They are wrapped in torch.compile when their modules are imported; on a CPU each process would start a C++ compiler.
    """
    jit = importlib.import_module("megatron.core.jit")
    jit.disable_jit_fuser()


# --- 3. The generator, and recompute --------------------------------------------------------------------------------


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


class _NoFP8:
    """What selective recompute asks Transformer Engine, which is not here, without looking first."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


_RNG: dict[str, Any] = {
    "_get_cuda_rng_state": _get_rng_state,
    "_set_cuda_rng_state": _set_rng_state,
    "FP8GlobalStateManager": _NoFP8,
    "activation_recompute_forward": lambda **_: contextlib.nullcontext(),
    "fp8_autocast": lambda **_: contextlib.nullcontext(),
}


# --- 4. The same for less --------------------------------------------------------------------------------------------


def _reduce_scatter(output: torch.Tensor, source: torch.Tensor, **arguments: Any) -> Any:
    """Over one rank the output is the source itself; gloo would copy it through a buffer of its own size."""
    if arguments["group"].size() == 1 and not arguments["async_op"]:
        return None
    return dist.reduce_scatter_tensor(output, source, **arguments)


def _all_gather(output: torch.Tensor, source: torch.Tensor, **arguments: Any) -> Any:
    """Likewise."""
    if arguments["group"].size() == 1 and not arguments["async_op"]:
        return None
    return dist.all_gather_into_tensor(output, source, **arguments)


def _scale(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], scale: float) -> None:
    """Without apex, megatron-core clips by way of a scaled copy of each gradient: fresh memory each time."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., gate and up], its gradient written in place: autograd's would be put together by a copy
    of both halves, the largest tensor of a layer.
    """

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        of_both = torch.empty_like(both)
        of_gate, of_up = of_both.chunk(2, dim=-1)
        scratch = torch.nn.functional.silu(gate)
        torch.mul(grad, scratch, out=of_up)
        torch.mul(grad, up, out=scratch)
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=of_gate)
        return of_both


def _swiglu(both: torch.Tensor, bias: None, fp8_input_store: bool = False, offload: bool = False) -> torch.Tensor:
    assert bias is None, "these decoders have no bias in their MLP"
    output: torch.Tensor = _SwiGLU.apply(both)
    return output


_FASTER: dict[str, dict[str, Callable[..., Any]]] = {
    "megatron.core.distributed.param_and_grad_buffer": {
        "dist_reduce_scatter_func": _reduce_scatter,
        "dist_all_gather_func": _all_gather,
    },
    "megatron.core.optimizer.clip_grads": {"multi_tensor_scale_impl": _scale},
    "megatron.core.transformer.mlp": {"bias_swiglu_impl": _swiglu},
}
