"""What makes two runs train weights of the same names and shapes."""

from __future__ import annotations

from typing import Any

from megavlm.build.run_config import RunConfig

_MAY_CHANGE = ("hidden_dropout", "attention_dropout", "init_method_std", "max_position_embeddings")
"""Fields of the decoder that a run may change when it goes on."""


def model_identity(run: RunConfig) -> dict[str, Any]:
    """The model's shape, whatever of it learns and however its images are cut."""
    settings = run.to_dict()
    decoder = {name: value for name, value in settings["decoder"].items() if name not in _MAY_CHANGE}
    aquila_vl = settings["aquila_vl"] and {k: v for k, v in settings["aquila_vl"].items() if k != "grid"}
    return {"decoder": decoder, "infimm": settings["infimm"], "aquila_vl": aquila_vl}
