"""The machine that this process runs on, as the rest of the package asks for it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from megavlm.errors import UnavailableError
from megavlm.platform.doctor.checks import LEAST_TRANSFORMER_ENGINE, release


def prepare() -> torch.device:
    """Make megatron-core run on this machine and return the device of this process; call it before all else.

    With CUDA this only says which GPU is ours. Without it the CPU adapter is installed, once.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    from megavlm.platform import cpu

    cpu.install()
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that carries this machine's tensors."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def chip() -> tuple[str, tuple[int, int] | None]:
    """The name of this process's chip, and its CUDA compute capability (None: it has none)."""
    if not torch.cuda.is_available():
        return "this CPU", None
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability()


def check_transformer_engine() -> None:
    """Refuse one that is too old for packed rows; it is about to be used."""
    try:
        found = version("transformer-engine")
    except PackageNotFoundError:  # on the path without having been installed
        return
    if release(found) < release(LEAST_TRANSFORMER_ENGINE):
        problem = f"is too old: packed rows want {LEAST_TRANSFORMER_ENGINE}"
        remedy = "install a newer one, or use --transformer-impl local"
        raise UnavailableError("transformer-engine", found, problem, remedy)


def fused_parts(transformer_engine: bool, dtype: torch.dtype) -> dict[str, bool | str]:
    """The fields of TransformerConfig for fused parts, each on where what it needs is installed.

    Optimizers and multi-tensor kernels need no field: megatron-core takes Transformer Engine's or apex's by itself.
    """
    cuda = torch.cuda.is_available()
    return {
        # apex's CUDA extension adds weight gradients straight into the float32 buffer. Layers of Transformer Engine
        # could do without it, but the output layer is megatron-core's own and refuses the field where it is missing.
        "gradient_accumulation_fusion": cuda and _importable("fused_weight_gradient_mlp_cuda"),
        "apply_rope_fusion": cuda and transformer_engine,
        # megatron-core's rounds the gradient to bf16 whatever the run's format. Transformer Engine's is worse: up to
        # 2.7 it weights all tokens of a row like the first one, and up to 2.17 it rounds before it weights.
        "cross_entropy_loss_fusion": cuda and dtype == torch.bfloat16,
        "cross_entropy_fusion_impl": "native",
        # torch.compile'd on a GPU, and on a CPU written by hand in the adapter.
        "bias_activation_fusion": True,
        # torch.compile'd; on a CPU it runs eager and saves nothing.
        "bias_dropout_fusion": cuda,
    }


def _importable(module: str) -> bool:
    return find_spec(module) is not None
