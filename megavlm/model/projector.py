"""The projector of LLaVA-OneVision: features of the vision tower become embeddings of the decoder's width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megavlm.model.state_map import Entry, StateMap


class Projector(nn.Module):
    """Two linear layers, the exact (erf) GELU between them (`mlp2x_gelu`)."""

    def __init__(self, width: int, hidden_size: int) -> None:
        """`width` is the tower's, `hidden_size` the decoder's."""
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """[..., width] -> [..., hidden_size]."""
        return self.linear_2(F.gelu(self.linear_1(features)))


def projector_state_map(width: int, hidden_size: int, theirs: tuple[str, str], ours: str = "projector.") -> StateMap:
    """The table of this projector: `theirs` are the prefixes of the two layers' `weight` and `bias`.

    Letters of shapes: D the tower's width, H the decoder's hidden width.
    """
    layers = zip(("linear_1.", "linear_2."), theirs, ("D", "H"), strict=True)
    return StateMap(
        entries=tuple(entry for layer, prefix, columns in layers for entry in _linear(ours + layer, prefix, columns)),
        sizes={"D": width, "H": hidden_size},
        query_groups=1,
    )


def _linear(ours: str, theirs: str, columns: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}weight", {f"{theirs}weight": f"H {columns}"}, fresh="linear"),
        Entry(f"{ours}bias", {f"{theirs}bias": "H"}, fresh="zeros"),
    )
