"""sequence_assemble in plain PyTorch: the truth that the kernels are held against, and what the CPU runs."""

from __future__ import annotations

import torch


def sequence_assemble_reference(
    text: torch.Tensor,
    features: torch.Tensor,
    newline: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments as in `op.sequence_assemble`; autograd gives the backward."""
    sources = torch.cat([text, features, newline[None], newline.new_zeros(1, newline.shape[0])])
    nothing = sources.shape[0] - 1
    row = torch.where((index < 0) | (index > nothing), nothing, index).long()
    # A sum over one column is a copy; over several it is taken in fp32, as the kernels do.
    picked = sources.index_select(0, row.flatten()).unflatten(0, index.shape)
    if weight is not None:
        picked = picked.to(torch.promote_types(text.dtype, weight.dtype)) * weight[..., None]
    return picked.sum(1).to(text.dtype)
