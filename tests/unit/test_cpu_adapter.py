"""The CPU adapter: what it replaces, that it leaves torch alone, and that no module on our way is forgotten."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch

from megavlm.platform import cpu, machine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without CUDA")

# Modules of megatron-core that name CUDA in a literal and are not on our way; a new version's list is a reason to look.
NOT_ON_OUR_WAY = (
    "megatron.core.distributed.fsdp",  # another data parallelism
    "megatron.core.distributed.torch_fully_sharded_data_parallel",
    "megatron.core.extensions",  # Transformer Engine and other CUDA libraries
    "megatron.core.export",
    "megatron.core.fusions",  # CUDA kernels
    "megatron.core.inference",
    "megatron.core.models",  # other families
    "megatron.core.optimizer.layer_wise_optimizer",
    "megatron.core.optimizer.muon",
    "megatron.core.optimizer.cpu_offloading",  # from a GPU
    "megatron.core.pipeline_parallel.hybrid_cp_schedule",  # context parallelism
    "megatron.core.pipeline_parallel.combined_1f1b",  # experts
    "megatron.core.pipeline_parallel.fine_grained_activation_offload",  # from a GPU
    "megatron.core.pipeline_parallel.utils",  # streams of combined_1f1b
    "megatron.core.resharding",
    "megatron.core.ssm",
    "megatron.core.tensor_parallel.random",  # its generator functions are replaced whole
    "megatron.core.tensor_parallel.inference_layers",
    "megatron.core.tensor_parallel.data",  # megatron-core's own batch broadcast
    "megatron.core.tensor_parallel.layers",  # the device type of autocast, which is off
    "megatron.core.transformer.moe",
    "megatron.core.transformer.cuda_graphs",
    "megatron.core.transformer.custom_layers",
    "megatron.core.transformer.experimental_attention_variant",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.transformer.fsdp_dtensor_checkpoint",
    "megatron.core.dist_checkpointing",  # fully parallel loads
    "megatron.core.datasets",
    "megatron.core.tokenizers",
    "megatron.core.full_cuda_graph",
    "megatron.core.nccl_allocator",
    "megatron.core.energy_monitor",
    "megatron.core.rerun_state_machine",
    "megatron.core.timers",
    "megatron.core.fp8_utils",
    "megatron.core.fp4_utils",
)


def constants(value: Any) -> Iterator[Any]:
    """Every constant in a function's code, nested code and tuples included."""
    if isinstance(value, types.CodeType):
        for constant in value.co_consts:
            yield from constants(constant)
    elif isinstance(value, tuple):
        for part in value:
            yield from constants(part)
    else:
        yield value


def names_cuda(source: str) -> bool:
    found = constants(compile(source, "source", "exec"))
    return any(constant in cpu._LITERALS for constant in found if isinstance(constant, str))


def test_no_literal_is_left_in_the_listed_modules() -> None:
    machine.prepare()
    for name in cpu._MODULES_WITH_LITERALS:
        module = importlib.import_module(name)
        functions = list(cpu._functions_of(module, name))
        assert functions
        left = [f.__qualname__ for f in functions for c in constants(f.__code__) if isinstance(c, str) and c == "cuda"]
        assert not left, f"{name}: {left}"


def test_every_module_that_names_cuda_is_listed_or_off_our_way() -> None:
    known = (*cpu._MODULES_WITH_LITERALS, *NOT_ON_OUR_WAY)
    root = Path(megatron.core.__path__[0])
    sources = {".".join(("megatron.core", *f.relative_to(root).with_suffix("").parts)): f for f in root.rglob("*.py")}
    assert len(sources) > 100
    unknown = [
        name for name, file in sources.items() if not name.startswith(known) and names_cuda(file.read_text("utf-8"))
    ]
    assert not unknown


def test_every_listed_module_names_cuda() -> None:
    for name in cpu._MODULES_WITH_LITERALS:
        assert names_cuda(inspect.getsource(importlib.import_module(name))), f"{name} needs no rewriting any more"


def test_torch_itself_is_untouched() -> None:
    """In a fresh process: all of torch's own functions are the same objects before and after."""
    script = """
import torch
import torch.nn.functional as F
spaces = [torch, torch.Tensor, F, torch.nn, torch.autograd, torch.distributed]
import megatron.core.models.gpt, megatron.core.optimizer
from megavlm.platform import machine
before = {(i, n): getattr(s, n) for i, s in enumerate(spaces) for n in dir(s) if callable(getattr(s, n, None))}
machine.prepare()
changed = [n for (i, n), f in before.items() if getattr(spaces[i], n) is not f and getattr(spaces[i], n) != f]
print(sorted(set(changed)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['cuda']", done.stdout


def test_seeds_of_the_tracker_repeat_and_differ() -> None:
    machine.prepare()
    from megatron.core.tensor_parallel import random

    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        random.model_parallel_cuda_manual_seed(seed, tp_rank=0, ep_rank=0, etp_rank=0)
        outside = torch.rand(4)
        with random.get_cuda_rng_tracker().fork():
            inside = torch.rand(4)
        return outside, inside

    first, again, other = draw(3), draw(3), draw(4)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_gated_activation_and_its_gradient_are_autograds(dtype: torch.dtype) -> None:
    machine.prepare()
    both = torch.randn(5, 2, 14, dtype=dtype, requires_grad=True)
    grad = torch.randn(5, 2, 7, dtype=dtype)
    found = importlib.import_module("megatron.core.transformer.mlp").bias_swiglu_impl(both, None)
    gate, up = both.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (mine,) = torch.autograd.grad(found, both, grad)
    (theirs,) = torch.autograd.grad(expected, both, grad)
    torch.testing.assert_close(mine, theirs)
