"""Configuration of InfiMM: a vision tower, a resampler, and a language model with gated cross-attention."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig, PretrainedConfig

_LANGUAGE_CONFIGS = {"mistral": MistralConfig, "llama": LlamaConfig}
RESAMPLER = {"depth": 6, "num_latents": 64, "heads": 8, "head_width": 64, "mlp_ratio": 4, "norm_epsilon": 1e-5}
CROSS_ATTENTION = {"heads": 8, "head_width": 64, "ff_multiple": 4, "norm_epsilon": 1e-5}
"""Sizes of the released models, which their config.json does not tell."""


class InfiMMConfig(PretrainedConfig):
    """What the three InfiMM models share; each has a subclass with its own `model_type`.

    visual: the EVA-CLIP tower, as a plain dictionary with EVA-CLIP's own keys.
    language: the decoder's configuration, as an object or a dictionary.
    cross_attn_every_n_layers: a gated block stands before decoder layers n, 2n, ... (counted from 1).
    image_token_id, eoc_token_id: `<image>`, which stands for an image, and `<|endofchunk|>`.
    resampler, cross_attention: sizes that differ from those of the released models.
    """

    language_model_type = "mistral"
    """The decoder's kind where `language` does not say."""
    sub_configs = {"language": PretrainedConfig}  # noqa: RUF012 - transformers reads it on the class

    def __init__(
        self,
        visual: dict[str, Any] | None = None,
        language: dict[str, Any] | PretrainedConfig | None = None,
        cross_attn_every_n_layers: int = 2,
        image_token_id: int = 32001,
        eoc_token_id: int = 32000,
        resampler: dict[str, Any] | None = None,
        cross_attention: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.visual = visual or {}
        self.language = self._language_config(language)
        self.cross_attn_every_n_layers = cross_attn_every_n_layers
        self.image_token_id = image_token_id
        self.eoc_token_id = eoc_token_id
        self.resampler = {**RESAMPLER, **(resampler or {})}
        self.cross_attention = {**CROSS_ATTENTION, **(cross_attention or {})}
        # Said here and not left to the library's default: the released embeddings and heads are two tensors.
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    def _language_config(self, language: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
        if isinstance(language, PretrainedConfig):
            return language
        settings = dict(language or {})
        kind = settings.pop("model_type", self.language_model_type)
        if kind not in _LANGUAGE_CONFIGS:
            raise ValueError(f"language.model_type = {kind!r}: use one of {', '.join(_LANGUAGE_CONFIGS)}")
        return _LANGUAGE_CONFIGS[kind](**settings)

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        """The decoder's configuration: what caches and generation ask for."""
        return self.language


# Each subclass needs an `__init__` of its own: transformers 5 generates one from the fields where there is none.
class InfiMMZephyrConfig(InfiMMConfig):
    """InfiMM-Zephyr: a Mistral decoder."""

    model_type = "infimm-zephyr"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class InfiMMVicunaConfig(InfiMMConfig):
    """InfiMM-Vicuna: a Llama decoder."""

    model_type = "infimm-vicuna"
    language_model_type = "llama"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class InfiMMLlamaConfig(InfiMMConfig):
    """InfiMM-Llama2: a Llama decoder."""

    model_type = "infimm-llama"
    language_model_type = "llama"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
