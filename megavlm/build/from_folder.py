"""A run for the model that a Hugging Face folder holds: what `verify-hf` and `generate` build."""

from __future__ import annotations

from pathlib import Path

from megavlm.build.families import model_of_folder
from megavlm.build.run_config import RunConfig, TrainConfig, WeightsConfig
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.model.freeze import PARTS_OF_AQUILA_VL


def run_from_folder(path: str | Path) -> RunConfig:
    """The run of the folder's own shape that starts from its weights."""
    with HFFolder.open(path) as folder:
        found = model_of_folder(folder)
    run = RunConfig(
        name=str(path),
        decoder=found.decoder,
        infimm=found.infimm,
        aquila_vl=found.aquila_vl,
        train=TrainConfig(seq_length=min(512, found.decoder.longest_text)),
        weights=WeightsConfig(load_hf=str(path)),
    )
    return run if found.aquila_vl is None else run.replace(trainable=PARTS_OF_AQUILA_VL)
