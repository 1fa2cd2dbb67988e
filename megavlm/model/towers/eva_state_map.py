"""The EVA towers' weight names: those of released checkpoints beside ours.

Released InfiMM folders and public EVA-CLIP checkpoints spell the tower's tensors alike and differ in the prefix.
Letters of shapes, none of them also a decoder's: D width, M inner width of the MLP, T tokens of an image, P side of a
patch, C width of CLIP's head; 1 and 3 are themselves, 3D is three times D.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from megavlm.errors import WeightsError
from megavlm.model.state_map import Entry, StateMap, expand_layers
from megavlm.model.towers.eva import rope_table
from megavlm.model.towers.eva_config import EvaConfig

INFIMM_PREFIX = "model.vision_encoder."
_KNOWN_PREFIXES = (INFIMM_PREFIX, "visual.", "")

_BLOCK = "blocks.{i}."


def _norm(ours: str, theirs: str, size: str = "D") -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}.weight", {f"{theirs}.weight": size}, fresh="ones"),
        Entry(f"{ours}.bias", {f"{theirs}.bias": size}, fresh="zeros"),
    )


def _linear(ours: str, theirs: str, rows: str, columns: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}.weight", {f"{theirs}.weight": f"{rows} {columns}"}),
        Entry(f"{ours}.bias", {f"{theirs}.bias": rows}, fresh="zeros"),
    )


_COMMON = (
    Entry("class_token", {"cls_token": "1 1 D"}),
    Entry("position_embedding", {"pos_embed": "1 T D"}),
    Entry("patch_embedding.weight", {"patch_embed.proj.weight": "D 3 P P"}, flattened=True),
    Entry("patch_embedding.bias", {"patch_embed.proj.bias": "D"}, fresh="zeros"),
    *_norm("norm", "norm"),
    *_linear("head", "head", "C", "D"),
    *_norm(_BLOCK + "attention_norm", _BLOCK + "norm1"),
    *_norm(_BLOCK + "mlp_norm", _BLOCK + "norm2"),
    Entry(_BLOCK + "attention.q_bias", {_BLOCK + "attn.q_bias": "D"}, fresh="zeros"),
    Entry(_BLOCK + "attention.v_bias", {_BLOCK + "attn.v_bias": "D"}, fresh="zeros"),
    *_linear(_BLOCK + "attention.proj", _BLOCK + "attn.proj", "D", "D"),
)

_FUSED_QKV = (Entry(_BLOCK + "attention.qkv.weight", {_BLOCK + "attn.qkv.weight": "3D D"}),)

# Checkpoints with sub-LN keep the three projections apart.
_SUB_NORM = (
    Entry(_BLOCK + "attention.qkv.weight", {_BLOCK + f"attn.{x}_proj.weight": "D D" for x in "qkv"}),
    *_norm(_BLOCK + "attention.sub_norm", _BLOCK + "attn.inner_attn_ln"),
    *_norm(_BLOCK + "mlp.sub_norm", _BLOCK + "mlp.ffn_ln", "M"),
)

_MLP = {
    "swiglu": (
        *_linear(_BLOCK + "mlp.gate", _BLOCK + "mlp.w1", "M", "D"),
        *_linear(_BLOCK + "mlp.up", _BLOCK + "mlp.w2", "M", "D"),
        *_linear(_BLOCK + "mlp.down", _BLOCK + "mlp.w3", "D", "M"),
    ),
    "gelu": (
        *_linear(_BLOCK + "mlp.up", _BLOCK + "mlp.fc1", "M", "D"),
        *_linear(_BLOCK + "mlp.down", _BLOCK + "mlp.fc2", "D", "M"),
    ),
}


def eva_state_map(config: EvaConfig, theirs: str = INFIMM_PREFIX, ours: str = "") -> StateMap:
    """The table of this tower, its tensors under the prefix `theirs` and its parameters under `ours`."""
    entries = (*_COMMON, *(_SUB_NORM if config.sub_norm else _FUSED_QKV), *_MLP[config.mlp])
    return StateMap(
        entries=tuple(entry.under(ours, theirs) for entry in expand_layers(entries, config.depth)),
        sizes={
            "1": 1,
            "3": 3,
            "D": config.width,
            "3D": 3 * config.width,
            "M": config.mlp_width,
            "T": config.tokens,
            "P": config.patch_size,
            "C": config.head_dim_out,
        },
        query_groups=1,
        constants=_rope_constants(config, theirs) if config.rope else {},
    )


def find_eva_prefix(names: Iterable[str], where: str) -> str:
    """The prefix of the tower's tensors in a file: an InfiMM folder, a whole CLIP model or the tower alone."""
    held = set(names)
    for prefix in _KNOWN_PREFIXES:
        if f"{prefix}cls_token" in held:
            return prefix
    problem = f"is there under none of the prefixes {', '.join(map(repr, _KNOWN_PREFIXES))}"
    raise WeightsError(where, "cls_token", problem, "take an EVA-CLIP checkpoint or an InfiMM folder")


def _rope_constants(config: EvaConfig, prefix: str) -> dict[str, Tensor]:
    cos, sin = rope_table(config)
    modules = ["rope", *(f"blocks.{i}.attn.rope" for i in range(config.depth))]
    tables = {"freqs_cos": cos, "freqs_sin": sin}
    return {f"{prefix}{module}.{name}": table for module in modules for name, table in tables.items()}
