"""The SigLIP tower's weight names: those of released folders beside ours.

SigLIP and LLaVA-OneVision folders spell the tower's tensors alike and differ in the prefix, which is what stands
before `embeddings.patch_embedding.weight`. Letters of shapes, none of them also a decoder's: D width, M inner width of
the MLP, T tokens of an image, P side of a patch; 3 is itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megavlm.errors import WeightsError
from megavlm.model.state_map import Entry, StateMap, expand_layers
from megavlm.model.towers.siglip_config import SiglipConfig

_FIRST = "embeddings.patch_embedding.weight"
_BLOCK = "blocks.{i}."
_LAYER = "encoder.layers.{i}."
_LAYER_NUMBER = re.compile(r"encoder\.layers\.([0-9]{1,4})\.")
_OTHER_HALF = ("text_model.", "logit_scale", "logit_bias")


def _norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}.weight", {f"{theirs}.weight": "D"}, fresh="ones"),
        Entry(f"{ours}.bias", {f"{theirs}.bias": "D"}, fresh="zeros"),
    )


def _linear(ours: str, theirs: tuple[str, ...], rows: str, columns: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}.weight", {f"{name}.weight": f"{rows} {columns}" for name in theirs}),
        Entry(f"{ours}.bias", {f"{name}.bias": rows for name in theirs}, fresh="zeros"),
    )


_TABLE = (
    Entry("patch_embedding.weight", {_FIRST: "D 3 P P"}, flattened=True),
    Entry("patch_embedding.bias", {"embeddings.patch_embedding.bias": "D"}, fresh="zeros"),
    Entry("position_embedding", {"embeddings.position_embedding.weight": "T D"}),
    *_norm("post_layernorm", "post_layernorm"),
    *_norm(_BLOCK + "attention_norm", _LAYER + "layer_norm1"),
    *_norm(_BLOCK + "mlp_norm", _LAYER + "layer_norm2"),
    *_linear(_BLOCK + "attention.qkv", tuple(_LAYER + f"self_attn.{x}_proj" for x in "qkv"), "D", "D"),
    *_linear(_BLOCK + "attention.proj", (_LAYER + "self_attn.out_proj",), "D", "D"),
    *_linear(_BLOCK + "mlp.up", (_LAYER + "mlp.fc1",), "M", "D"),
    *_linear(_BLOCK + "mlp.down", (_LAYER + "mlp.fc2",), "D", "M"),
)


def siglip_state_map(config: SiglipConfig, theirs: str, ours: str = "") -> StateMap:
    """The table of this tower, its tensors under the prefix `theirs` and its parameters under `ours`."""
    return StateMap(
        entries=tuple(entry.under(ours, theirs) for entry in expand_layers(_TABLE, config.depth)),
        sizes={
            "3": 3,
            "D": config.width,
            "M": config.mlp_width,
            "T": config.tokens,
            "P": config.patch_size,
        },
        query_groups=1,
    )


def find_siglip_prefix(names: Iterable[str], where: str) -> str:
    """The prefix of the tower's tensors in a file: a whole SigLIP model, its vision half, or a LLaVA-OneVision folder.

    It is found, not chosen from a list: versions of transformers write the same tower under different prefixes.
    """
    prefixes = sorted(name.removesuffix(_FIRST) for name in names if name == _FIRST or name.endswith("." + _FIRST))
    if len(prefixes) == 1:
        return prefixes[0]
    problem = f"is there under the prefixes {', '.join(map(repr, prefixes[:3]))}" if prefixes else "is there nowhere"
    raise WeightsError(where, _FIRST, problem, "take a folder of SigLIP or LLaVA-OneVision, which holds one tower")


def is_unused(name: str, prefix: str, depth: int) -> bool:
    """Whether a published SigLIP folder holds this tensor beside a tower of `depth` blocks.

    That is: later blocks and the pooling head under the tower's prefix, and outside it the text tower and the logits.
    """
    if not name.startswith(prefix):
        return name.startswith(_OTHER_HALF)
    rest = name.removeprefix(prefix)
    layer = _LAYER_NUMBER.match(rest)
    return rest.startswith("head.") or (layer is not None and int(layer[1]) >= depth)
