"""The decoders' weight names: Hugging Face's beside ours.

Letters of shapes: V vocabulary, H hidden width, Q all query heads, K all key (or value) heads, F inner width of the
MLP.
"""

from __future__ import annotations

from megavlm.model.decoder.config import DecoderConfig, Family
from megavlm.model.state_map import Entry, StateMap, expand_layers

_LAYER = "model.layers.{i}."
_OURS = "decoder.layers.{i}."

_LLAMA = (
    Entry("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "V H"}, "rows", padded=True),
    Entry("decoder.final_layernorm.weight", {"model.norm.weight": "H"}, fresh="ones"),
    Entry(_OURS + "input_layernorm.weight", {_LAYER + "input_layernorm.weight": "H"}, fresh="ones"),
    Entry(
        _OURS + "self_attention.linear_qkv.weight",
        {
            _LAYER + "self_attn.q_proj.weight": "Q H",
            _LAYER + "self_attn.k_proj.weight": "K H",
            _LAYER + "self_attn.v_proj.weight": "K H",
        },
        "rows",
        "by query group",
    ),
    Entry(_OURS + "self_attention.linear_proj.weight", {_LAYER + "self_attn.o_proj.weight": "H Q"}, "columns"),
    Entry(_OURS + "pre_mlp_layernorm.weight", {_LAYER + "post_attention_layernorm.weight": "H"}, fresh="ones"),
    Entry(
        _OURS + "mlp.linear_fc1.weight",
        {_LAYER + "mlp.gate_proj.weight": "F H", _LAYER + "mlp.up_proj.weight": "F H"},
        "rows",
        "by rank",
    ),
    Entry(_OURS + "mlp.linear_fc2.weight", {_LAYER + "mlp.down_proj.weight": "H F"}, "columns"),
)

_QKV_BIAS = Entry(
    _OURS + "self_attention.linear_qkv.bias",
    {
        _LAYER + "self_attn.q_proj.bias": "Q",
        _LAYER + "self_attn.k_proj.bias": "K",
        _LAYER + "self_attn.v_proj.bias": "K",
    },
    "rows",
    "by query group",
    fresh="zeros",
)

_TABLES: dict[Family, tuple[Entry, ...]] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": (*_LLAMA, _QKV_BIAS)}

_OUTPUT = Entry("output_layer.weight", {"lm_head.weight": "V H"}, "rows", padded=True)

# Tensors that some folders hold beside the weights, and that hold none: rotary frequencies of old transformers.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def decoder_state_map(config: DecoderConfig) -> StateMap:
    """The table of this decoder; with tied embeddings there is no output layer in it."""
    entries = _TABLES[config.family] + (() if config.tied_embeddings else (_OUTPUT,))
    return StateMap(
        entries=expand_layers(entries, config.num_layers),
        sizes={
            "V": config.vocab_size,
            "H": config.hidden_size,
            "Q": config.num_attention_heads * config.kv_channels,
            "K": config.num_query_groups * config.kv_channels,
            "F": config.ffn_hidden_size,
        },
        query_groups=config.num_query_groups,
        copies={"lm_head.weight": "model.embed_tokens.weight"} if config.tied_embeddings else {},
    )
