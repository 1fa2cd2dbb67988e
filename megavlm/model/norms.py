"""RMSNorm and LayerNorm that are right under sequence parallelism.

Under sequence parallelism each tensor-parallel rank normalises its own slice of the sequence, so the gradient of a
norm's weight is a partial sum. megatron-core adds these sums up for parameters that carry the mark
`sequence_parallel`; torch's norms don't set it, and megatron-core's wrapper around them refuses the combination.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class Norm:
    """Builds the norm that `config.normalization` names, with its weights marked for sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> nn.Module:  # type: ignore[misc]
        assert not config.layernorm_zero_centered_gamma, "zero-centred norms need Transformer Engine"
        kinds: dict[str, type[nn.Module]] = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
        norm = kinds[config.normalization](
            hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
