"""What an exported InfiMM folder carries beside weights, config.json and tokenizer: code, processor and chat format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from megavlm.errors import ConfigError
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.infimm.config import InfiMMConfig, infimm_to_hf

_FILES = files("megavlm.export") / "infimm_files"


@dataclass(frozen=True)
class _Kind:
    name: str
    """What its classes are called: InfiMM<name>Config, InfiMM<name>Model."""
    chat_template: str
    """The file of its chat format."""


_KINDS = {
    "infimm-zephyr": _Kind("Zephyr", "zephyr.jinja"),
    "infimm-vicuna": _Kind("Vicuna", "vicuna.jinja"),
    # The released Llama model's format is not known; its training data come in Vicuna's.
    "infimm-llama": _Kind("Llama", "vicuna.jinja"),
}


def infimm_family_files(decoder: DecoderConfig, parts: InfiMMConfig, dtype: str) -> dict[str, bytes]:
    """All that the folder holds beside weights and tokenizer."""
    config = {
        "architectures": [architecture(parts.model_type)],
        "auto_map": auto_map(parts.model_type),
        **infimm_to_hf(decoder, parts, dtype),
    }
    return {
        "config.json": _json(config),
        **infimm_files(),
        **processor_files(parts.model_type, parts.tower.image_size),
    }


def infimm_files() -> dict[str, bytes]:
    """The Python files of the folder, by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(_FILES.iterdir(), key=lambda path: path.name)
        if path.name.endswith("_infimm.py")
    }


def architecture(model_type: str) -> str:
    """The model class that config.json names under `architectures`."""
    return f"InfiMM{_kind(model_type).name}Model"


def auto_map(model_type: str) -> dict[str, str]:
    """`auto_map` of config.json: which class of which file transformers' Auto classes take."""
    return {
        "AutoConfig": f"configuration_infimm.InfiMM{_kind(model_type).name}Config",
        "AutoModelForCausalLM": f"modeling_infimm.{architecture(model_type)}",
        **_PROCESSOR_AUTO_MAP,
    }


def processor_files(model_type: str, image_size: int) -> dict[str, bytes]:
    """The files from which `AutoProcessor` (with the tokenizer's own files) makes the processor."""
    kind = _kind(model_type)
    shared = {"auto_map": _PROCESSOR_AUTO_MAP, "processor_class": "InfiMMProcessor"}
    image_processor = {**shared, "image_processor_type": "InfiMMImageProcessor", "image_size": image_size}
    return {
        "processor_config.json": _json(shared),
        "preprocessor_config.json": _json(image_processor),
        "chat_template.jinja": (_FILES / kind.chat_template).read_bytes(),
    }


_PROCESSOR_AUTO_MAP = {
    "AutoProcessor": "processing_infimm.InfiMMProcessor",
    "AutoImageProcessor": "image_processing_infimm.InfiMMImageProcessor",
}


def _kind(model_type: str) -> _Kind:
    if model_type not in _KINDS:
        raise ConfigError("model_type", model_type, "is no InfiMM", f"use one of {', '.join(_KINDS)}")
    return _KINDS[model_type]


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
