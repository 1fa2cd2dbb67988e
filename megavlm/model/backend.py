"""One place that decides whose layers a model is made of.

Transformer Engine's where it is installed (bf16 and FP8), ours over megatron-core's local ones elsewhere. Everything
that builds a layer asks `spec_provider()` and then builds the same way for both.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider

from megavlm.errors import UnavailableError
from megavlm.model.attention import SDPACoreAttention
from megavlm.model.norms import Norm

Implementation = Literal["auto", "transformer_engine", "local"]


class TorchSpecProvider(LocalSpecProvider):
    """megatron-core's local tensor-parallel layers with our attention and norms.

    NVIDIA's apex, where it is installed, gives the fused LayerNorm; it has no RMSNorm that megatron-core can use.
    """

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return FusedLayerNorm if _have_apex_norm() and not rms_norm else Norm

    def core_attention(self) -> type:
        return SDPACoreAttention


def _have_apex_norm() -> bool:
    return find_spec("apex") is not None and find_spec("apex.normalization") is not None


def spec_provider(implementation: Implementation = "auto") -> BackendSpecProvider:
    """The layers to build with; `auto` takes Transformer Engine's where it is installed."""
    if implementation == "transformer_engine" and not HAVE_TE:
        raise UnavailableError(
            "--transformer-impl",
            implementation,
            "Transformer Engine is not installed here",
            "install the extra megavlm[gpu], or use --transformer-impl auto or local",
        )
    if implementation == "local" or not HAVE_TE:
        return TorchSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def is_transformer_engine(provider: BackendSpecProvider) -> bool:
    """Whether these are Transformer Engine's layers: the ones that hold a norm inside the linear layer behind it."""
    return provider.fuse_layernorm_and_linear()
