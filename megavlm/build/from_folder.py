"""A run for the model that a Hugging Face folder holds: what `verify-hf` and `generate` build."""

from __future__ import annotations

from pathlib import Path

from megavlm.build.run_config import RunConfig, TrainConfig, WeightsConfig
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.errors import ConfigError
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.infimm.config import infimm_from_hf


def run_from_folder(path: str | Path) -> RunConfig:
    """The run of the folder's own shape that starts from its weights."""
    with HFFolder.open(path) as folder:
        config, where = folder.config, f"{path}/config.json"
    kind = config.get("model_type")
    if kind is None:
        raise ConfigError(f"{where}: model_type", None, "is missing", "take a folder that transformers can load")
    if str(kind).startswith("infimm"):
        decoder, parts = infimm_from_hf(config, where)
    else:
        decoder, parts = DecoderConfig.from_hf(config, where), None
    return RunConfig(
        name=str(path),
        decoder=decoder,
        infimm=parts,
        train=TrainConfig(seq_length=min(512, decoder.longest_text)),
        weights=WeightsConfig(load_hf=str(path)),
    )
