"""Aquila-VL's weight names: those of the public layouts beside ours.

The parts have tables of their own; a spelling says under which names a layout holds each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megavlm.errors import WeightsError
from megavlm.model.aquila_vl.config import AquilaVLConfig
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.state_map import decoder_state_map
from megavlm.model.projector import projector_state_map
from megavlm.model.state_map import Entry, StateMap, merged
from megavlm.model.towers.siglip_state_map import find_siglip_prefix, siglip_state_map

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Spelling:
    """How a layout names the parts."""

    decoder: str
    """What stands where the decoder alone has `model.`."""
    head: str
    """The output layer."""
    tower: str
    """Before the tower's names."""
    projector: tuple[str, str]
    """Before `weight` and `bias` of the two layers."""
    newline: str
    """The newline."""

    def name(self, decoder_name: str) -> str:
        """A tensor of the decoder alone under the layout's name."""
        return self.head if decoder_name == _HEAD else self.decoder + decoder_name.removeprefix("model.")

    @property
    def embedding(self) -> str:
        """The input embedding."""
        return self.name(_EMBEDDING)


TRANSFORMERS = Spelling(
    decoder="language_model.model.",
    head="language_model.lm_head.weight",
    tower="vision_tower.vision_model.",
    projector=("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    newline="image_newline",
)
"""LlavaOnevision on disk, as every version of transformers reads it."""
LLAVA_NEXT = Spelling(
    decoder="model.",
    head="lm_head.weight",
    tower="model.vision_tower.vision_tower.vision_model.",
    projector=("model.mm_projector.0.", "model.mm_projector.2."),
    newline="model.image_newline",
)
_RUNTIME = Spelling(
    decoder="model.language_model.",
    head="lm_head.weight",
    tower="model.vision_tower.vision_model.",
    projector=("model.multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_2."),
    newline="model.image_newline",
)
"""As transformers' modules are called from 4.52 on, which some tools write out."""


def find_spelling(names: Sequence[str], where: str) -> Spelling:
    """The spelling of a folder's tensors; before the tower's, versions of transformers write different things."""
    for spelling in (TRANSFORMERS, LLAVA_NEXT, _RUNTIME):
        if spelling.embedding in names:
            return replace(spelling, tower=find_siglip_prefix(names, where))
    raise WeightsError(
        where,
        TRANSFORMERS.embedding,
        "is there under none of the known names",
        "take a folder in the layout of transformers or of LLaVA-NeXT",
    )


def aquila_vl_state_map(decoder: DecoderConfig, parts: AquilaVLConfig, spelling: Spelling = TRANSFORMERS) -> StateMap:
    """The table of the whole model, tower included."""
    language = decoder_state_map(decoder)
    newline = Entry("image_newline", {spelling.newline: "H"}, fresh="unit length")
    return merged(
        replace(
            language,
            entries=(*(_spelled(entry, spelling) for entry in language.entries), newline),
            copies={spelling.name(copy): spelling.name(name) for copy, name in language.copies.items()},
        ),
        projector_state_map(parts.tower.width, decoder.hidden_size, theirs=spelling.projector),
        siglip_state_map(parts.tower, theirs=spelling.tower, ours="tower."),
    )


def _spelled(entry: Entry, spelling: Spelling) -> Entry:
    return replace(entry, theirs={spelling.name(name): shape for name, shape in entry.theirs.items()})
