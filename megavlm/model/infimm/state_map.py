"""InfiMM's weight names: the released folder's beside ours.

Letters beside the decoder's and the tower's: I inner width of the gated attention, 2I its keys and values together,
G inner width of the gated feed-forward, D the tower's width.
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.state_map import decoder_state_map
from megavlm.model.infimm.config import InfiMMConfig
from megavlm.model.resampler import resampler_state_map
from megavlm.model.state_map import Entry, StateMap, merged
from megavlm.model.towers.eva_state_map import eva_state_map

_LANGUAGE = "model.lang_encoder."
_GATED_LIST = "gated_cross_attn_layers"
_THEIRS = _LANGUAGE + "model.layers.{i}.gated_cross_attn_layer."
_OURS = "decoder.layers.{i}.gated."

_GATED = (
    Entry(_OURS + "attn_gate", {_THEIRS + "attn_gate": "1"}, fresh="zeros"),
    Entry(_OURS + "ff_gate", {_THEIRS + "ff_gate": "1"}, fresh="zeros"),
    Entry(_OURS + "norm.weight", {_THEIRS + "attn.norm.weight": "H"}, fresh="ones"),
    Entry(_OURS + "norm.bias", {_THEIRS + "attn.norm.bias": "H"}, fresh="zeros"),
    Entry(_OURS + "to_q.weight", {_THEIRS + "attn.to_q.weight": "I H"}, "rows", fresh="linear"),
    Entry(_OURS + "to_kv.weight", {_THEIRS + "attn.to_kv.weight": "2I D"}, "rows", "halves by rank", fresh="linear"),
    Entry(_OURS + "to_out.weight", {_THEIRS + "attn.to_out.weight": "H I"}, "columns", fresh="linear"),
    Entry(_OURS + "ff_norm.weight", {_THEIRS + "ff.0.weight": "H"}, fresh="ones"),
    Entry(_OURS + "ff_norm.bias", {_THEIRS + "ff.0.bias": "H"}, fresh="zeros"),
    Entry(_OURS + "ff_in.weight", {_THEIRS + "ff.1.weight": "G H"}, "rows", fresh="linear"),
    Entry(_OURS + "ff_out.weight", {_THEIRS + "ff.3.weight": "H G"}, "columns", fresh="linear"),
)


def infimm_state_map(decoder: DecoderConfig, parts: InfiMMConfig) -> StateMap:
    """The table of the whole model, tower included."""
    whole = merged(
        _decoder_map(decoder),
        _gated_map(decoder, parts),
        resampler_state_map(parts.resampler, ours="resampler."),
        eva_state_map(parts.tower, ours="tower."),
    )
    return replace(
        whole,
        aliases={alias: name for name in whole.folder_shapes() if (alias := _alias(name))},
        rows_apart={
            "new_input.rows": ("embedding.word_embeddings.weight", parts.new_tokens),
            "new_output.rows": ("output_layer.weight", parts.new_tokens),
        },
    )


def _alias(name: str) -> str | None:
    """The released model refers to its layers a second time, through lists of their own."""
    head, layers, rest = name.partition(_LANGUAGE + "model.layers.")
    number, _, inner = rest.partition(".")
    for module, second in (("decoder_layer.", "old_decoder_blocks"), ("gated_cross_attn_layer.", _GATED_LIST)):
        if layers and inner.startswith(module):
            return f"{head}{_LANGUAGE}{second}.{number}.{inner.removeprefix(module)}"
    return None


def released_name(decoder_name: str) -> str:
    """Where a tensor of the plain decoder's folder stands in InfiMM's."""
    head, layers, rest = decoder_name.partition("model.layers.")
    number, _, inner = rest.partition(".")
    return f"{_LANGUAGE}{head}{layers}{number}.decoder_layer.{inner}" if layers else _LANGUAGE + decoder_name


def _decoder_map(decoder: DecoderConfig) -> StateMap:
    """The decoder's own table under the released names: each layer has moved one level down."""
    plain = decoder_state_map(decoder)
    return replace(
        plain,
        entries=tuple(_moved(entry) for entry in plain.entries),
        copies={released_name(copy): released_name(name) for copy, name in plain.copies.items()},
    )


def _moved(entry: Entry) -> Entry:
    return replace(entry, theirs={released_name(name): shape for name, shape in entry.theirs.items()})


def _gated_map(decoder: DecoderConfig, parts: InfiMMConfig) -> StateMap:
    settings = parts.cross_attention
    layers = [i for i in range(decoder.num_layers) if settings.stands_before(i + 1)]
    return StateMap(
        entries=tuple(entry.for_layer(i) for i in layers for entry in _GATED),
        sizes={
            "1": 1,
            "H": decoder.hidden_size,
            "I": settings.inner_width,
            "2I": 2 * settings.inner_width,
            "G": settings.ff_multiple * decoder.hidden_size,
            "D": parts.tower.width,
        },
        query_groups=1,
    )
