"""A released folder of any family as a plain one under its first names, which a run can start from."""

from __future__ import annotations

from pathlib import Path

import torch

from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.errors import ConfigError
from megavlm.export.aquila_vl_assemble import normalise_aquila_vl
from megavlm.export.assemble import normalise_infimm
from megavlm.model.aquila_vl.config import is_aquila_vl


def normalise(released: str | Path, out: str | Path, dtype: torch.dtype) -> None:
    """Write the folder `out` by the rules of the family that config.json names."""
    with HFFolder.open(released) as folder:
        config = folder.config
    kind = str(config.get("model_type"))
    if is_aquila_vl(config):
        normalise_aquila_vl(released, out, dtype)
    elif kind.startswith("infimm"):
        normalise_infimm(released, out, dtype)
    else:
        where = f"{released}/config.json: model_type"
        remedy = "take a folder of InfiMM, of LLaVA-OneVision or of LLaVA-NeXT's llava_qwen"
        raise ConfigError(where, config.get("model_type"), "is no model with eyes that is known here", remedy)
