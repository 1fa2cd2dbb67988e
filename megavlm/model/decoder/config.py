"""The decoder's shape, and how Hugging Face's config.json spells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from megavlm.config import Config, require
from megavlm.errors import ConfigError

Family = Literal["llama", "mistral", "qwen2"]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# our field -> the key of config.json, the same in all three families
_HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "init_method_std": "initializer_range",
    "sliding_window": "sliding_window",
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """A LLaMA-like decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    family: Family = "llama"
    """Which of Hugging Face's classes it is: llama (LLaMA-2, Vicuna), mistral (Mistral, Zephyr) or qwen2 (Qwen2.5)."""
    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Inner width of the gated MLP."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key and value heads."""
    kv_channels: int
    """Width of a head."""
    vocab_size: int
    """Rows of the embedding that stand for tokens; padding for tensor parallelism comes on top."""
    max_position_embeddings: int = 4096
    """Longest sequence that the model was made for."""
    rotary_base: int = 10000
    """Base of the rotary frequencies."""
    norm_epsilon: float = 1e-5
    """Epsilon of the RMSNorms."""
    add_qkv_bias: bool = False
    """Whether the query, key and value projections have a bias (Qwen2.5)."""
    tied_embeddings: bool = False
    """Whether the output layer is the embedding itself."""
    sliding_window: int | None = None
    """Attention window of the published config; only sequences up to this length are accepted: it changes nothing."""
    bos_token_id: int | None = None
    """The token that begins a text, kept for the exported folder."""
    eos_token_ids: tuple[int, ...] = ()
    """The tokens that end a text, kept for the exported folder: without them generation does not stop."""
    pad_token_id: int | None = None
    """The token of padding, kept for the exported folder."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights."""
    hidden_dropout: float = 0.0
    """Dropout on the residual branches."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights."""

    def check(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1", "use a positive number")
        require(self.vocab_size >= 1, self, "vocab_size", "must be at least 1", "use the tokenizer's size")
        require(
            self.kv_channels >= 2 and self.kv_channels % 2 == 0,
            self,
            "kv_channels",
            "rotary positions turn pairs of channels",
            "use an even head width",
        )
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            self,
            "num_query_groups",
            f"does not divide {self.num_attention_heads} attention heads",
            "use a divisor of num_attention_heads",
        )
        require(
            self.add_qkv_bias == (self.family == "qwen2"),
            self,
            "add_qkv_bias",
            f"Hugging Face's {self.family} cannot hold it",
            "use true with family qwen2 and false with the others",
        )
        for name in ("hidden_dropout", "attention_dropout"):
            require(0.0 <= getattr(self, name) < 1.0, self, name, "is no probability below 1", "use 0.0 for none")

    @property
    def longest_text(self) -> int:
        """Tokens that it can read at once: windowed attention is full attention only up to the window."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str = "config.json") -> DecoderConfig:
        """Read config.json; what this decoder cannot compute is refused, never ignored."""
        family = hf.get("model_type")
        if family not in get_args(Family):
            raise ConfigError(
                f"{where}: model_type", family, "is no decoder known here", f"use one of {', '.join(get_args(Family))}"
            )
        _refuse_foreign_settings(hf, where)
        values = {ours: hf[theirs] for ours, theirs in _HF_KEYS.items() if hf.get(theirs) is not None}
        for ours in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
            if ours not in values:
                raise ConfigError(f"{where}: {_HF_KEYS[ours]}", None, "is missing", "add it, or take another folder")
            if not isinstance(values[ours], int) or values[ours] < 1:
                raise ConfigError(
                    f"{where}: {_HF_KEYS[ours]}", values[ours], "is no number of at least 1", "take another folder"
                )
        values.setdefault("num_query_groups", values["num_attention_heads"])
        values.setdefault("kv_channels", values["hidden_size"] // values["num_attention_heads"])
        values.setdefault("norm_epsilon", 1e-6)
        if family == "qwen2" and not hf.get("use_sliding_window", False):
            values.pop("sliding_window", None)
        base = (hf.get("rope_parameters") or {}).get("rope_theta", hf.get("rope_theta", 10000))
        if type(base) not in (int, float) or not 1 <= base < 2**63 or base != int(base):
            raise ConfigError(f"{where}: rope_theta", base, "only whole numbers are supported", "take a model with one")
        ends = hf.get("eos_token_id")
        values |= {
            "rotary_base": int(base),
            "bos_token_id": hf.get("bos_token_id"),
            "eos_token_ids": [] if ends is None else ends if isinstance(ends, list) else [ends],
            "pad_token_id": hf.get("pad_token_id"),
        }
        return cls.from_dict({**values, "family": family, "add_qkv_bias": family == "qwen2"})

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The config.json of the exported folder, in the spelling that old and new transformers read."""
        hf: dict[str, Any] = {theirs: getattr(self, ours) for ours, theirs in _HF_KEYS.items()}
        if self.family == "llama":
            del hf["sliding_window"]
        return {
            "architectures": [_ARCHITECTURES[self.family]],
            "model_type": self.family,
            **hf,
            "hidden_act": "silu",
            "attention_dropout": self.attention_dropout,
            "rope_theta": float(self.rotary_base),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(self.rotary_base)},
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids)
            if len(self.eos_token_ids) > 1
            else next(iter(self.eos_token_ids), None),
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            "torch_dtype": dtype,
        }


def _refuse_foreign_settings(hf: dict[str, Any], where: str) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(key) or {}, dict):
            raise ConfigError(f"{where}: {key}", hf[key], "is no mapping", "take an undamaged config.json")
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    only = {
        "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
        "rope_scaling": (kind, "default"),
        "attention_bias": (hf.get("attention_bias", False), False),
        "mlp_bias": (hf.get("mlp_bias", False), False),
    }
    for key, (found, known) in only.items():
        if found != known:
            raise ConfigError(f"{where}: {key}", found, f"only {known!r} is supported", "take a model without it")
    if hf.get("use_sliding_window"):
        raise ConfigError(
            f"{where}: use_sliding_window", True, "windowed attention is not supported", "take a model without it"
        )
