"""Making the toy bases: what they learn from, for how long, and the files that are kept."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from megavlm.data.toy_world.world import PICTURE_KINDS, Split, ToyWorld
from megavlm.log import get_logger
from megavlm.model.state_map import StateMap
from megavlm.model.towers.eva_state_map import eva_state_map
from megavlm.model.towers.siglip_state_map import siglip_state_map
from megavlm.recipes.tiny import EVA, SIGLIP
from megavlm.tiles import GridConfig
from megavlm.toy.bases import (
    DECODER_FILE,
    EVA_FILE,
    MANIFEST,
    PLACES_FILE,
    PROJECTOR_FILE,
    SIGLIP_FILE,
    base_tower,
    decoder_shape,
    write_decoder,
    write_weights,
)
from megavlm.toy.projector_start import patch_readings, word_meanings
from megavlm.toy.resampler_start import place_readings
from megavlm.toy.seen import Seen, seen_pictures, seen_tiles
from megavlm.toy.speech import Lesson, speech_accuracy, texts, train_decoder
from megavlm.toy.tokenizer import toy_words
from megavlm.toy.tower import Heads, Tower, labelled, tower_accuracy, train_tower

logger = get_logger(__name__)

PICTURES, HELD_OUT = 48_000, 200
TOWER_STEPS = 3000
TILED_PICTURES, TILED_STEPS, TILED_BATCH = 32_000, 2500, 128
"""Of Aquila-VL's tower, which sees two tiles of each picture, each of a quarter as many patches."""
TILES = GridConfig(tile_size=SIGLIP.image_size, patch_size=SIGLIP.patch_size)
LESSONS = (
    (ToyWorld(kinds=("colour", "shape", "position"), questions=10), 10_000, 1200, 2e-3),
    (ToyWorld(questions=10), 30_000, 2400, 2e-3),
    (ToyWorld(kinds=(*PICTURE_KINDS, *("count_by",) * 3), questions=10), 30_000, 1500, 2e-3),
)
"""What a decoder is told of, in how many texts, for how many steps, and the highest learning rate: which thing is where
comes first, counting by colour or form last."""
SIGHTS = ToyWorld(kinds=("shape", "position", "count", "count_by", *("reading",) * 4, "chart"))
"""Pictures for a tower: words come often, for they are the hardest to see."""
BASES = ("eva", "siglip", "decoder", "projector")
SPLITS: tuple[Split, ...] = ("unseen_pictures", "unseen_combinations")


def make_bases(folder: Path, *, shorter: int = 1, which: Sequence[str] = BASES) -> None:
    """Train bases, an hour on two cores for all, and write their weights and the manifest.

    `shorter`: divide samples and steps by this, for a look at whether it goes through.
    """
    facts = _known_facts(folder)
    for base in which:
        facts |= _MAKERS[base](folder, shorter)
    write_manifest(folder, facts)


def _known_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says already of files that are there."""
    if not (folder / MANIFEST).exists():
        return {}
    said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: about for name, about in said.items() if (folder / name).exists()}


def write_manifest(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """What each file is, and its bytes."""
    said = {}
    for name, about in facts.items():
        content = (folder / name).read_bytes()
        said[name] = {**about, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"made by": "tools/make_toy_bases.py", "files": said}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _make_eva(folder: Path, shorter: int) -> dict[str, dict[str, Any]]:
    seen = seen_pictures("train", 0, PICTURES // shorter, SIGHTS)
    tower, heads = train_tower(EVA, seen, TOWER_STEPS // shorter, after_step=_say("eva"))
    write_weights(tower_tensors(tower, eva_state_map(EVA, theirs="")), folder / EVA_FILE)
    write_weights({"places": place_readings(heads.patches.weight)}, folder / PLACES_FILE)
    taught = "labels of every patch of toy pictures, counts of whole pictures"
    read = "the tower's linear readings of a patch's row and column, from which the resampler's first attention is made"
    found: dict[str, Seen] = {split: seen_pictures(split, 0, HELD_OUT, SIGHTS) for split in SPLITS}
    return {EVA_FILE: _tower_facts(taught, tower, heads, found), PLACES_FILE: {"read off": read}}


def _make_siglip(folder: Path, shorter: int) -> dict[str, dict[str, Any]]:
    seen = seen_tiles("train", 0, TILED_PICTURES // shorter, SIGHTS, TILES)
    steps = TILED_STEPS // shorter
    tower, heads = train_tower(SIGLIP, seen, steps, batch=TILED_BATCH, after_step=_say("siglip"))
    write_weights(tower_tensors(tower, siglip_state_map(SIGLIP, theirs="")), folder / SIGLIP_FILE)
    taught = "labels of every patch of toy pictures squeezed into a tile and of tiles of them, counts of whole pictures"
    found: dict[str, Seen] = {}
    for split in SPLITS:
        tiles = seen_tiles(split, 0, HELD_OUT, SIGHTS, TILES)
        found |= {split: Seen(*(array[::2] for array in tiles)), f"{split}, tiles": Seen(*(a[1::2] for a in tiles))}
    return {SIGLIP_FILE: _tower_facts(taught, tower, heads, found)}


def _tower_facts(taught: str, tower: Tower, heads: Heads, found: Mapping[str, Seen]) -> dict[str, Any]:
    """What the manifest says of a tower."""
    accuracy = {name: tower_accuracy(tower, heads, labelled(pictures)) for name, pictures in found.items()}
    return {"taught": taught, "accuracy": _rounded(accuracy)}


def _make_decoder(folder: Path, shorter: int) -> dict[str, dict[str, Any]]:
    lessons = [
        Lesson(list(texts(toy_words(), "train", 0, count // shorter, world)), steps // shorter, rate)
        for world, count, steps, rate in LESSONS
    ]
    decoder = train_decoder(decoder_shape(), lessons, after_step=_say("decoder"))
    write_weights(decoder.state_dict(), folder / DECODER_FILE)
    return {DECODER_FILE: decoder_facts(decoder)}


def decoder_facts(decoder: LlamaForCausalLM) -> dict[str, Any]:
    """What the manifest says of a decoder: the share of right tokens of answers, their ends included."""
    words, found = toy_words(), dict[str, dict[str, float]]()
    for split in SPLITS:
        asked = {kind: list(texts(words, split, 0, HELD_OUT, ToyWorld(kinds=(kind,)))) for kind in PICTURE_KINDS}
        found[split] = {kind: speech_accuracy(decoder, of_kind) for kind, of_kind in asked.items()}
    return {"taught": "toy captions, and questions that they answer", "accuracy": _rounded(found)}


def _make_projector(folder: Path, shorter: int) -> dict[str, dict[str, Any]]:
    """From the tower and the decoder that are kept, so after these."""
    world = ToyWorld(kinds=("shape", "count"))
    pictures = labelled(seen_tiles("train", PICTURES, max(100, 500 // shorter), world, TILES))
    with tempfile.TemporaryDirectory() as place:
        decoder = LlamaForCausalLM.from_pretrained(write_decoder(Path(place) / "decoder"), dtype=torch.float32)
    made = {"readings": patch_readings(base_tower(SIGLIP), pictures), "meanings": word_meanings(decoder)}
    write_weights(made, folder / PROJECTOR_FILE)
    read = "readings of patches, and what the decoder's first layer makes of the words for them: the projector's start"
    return {PROJECTOR_FILE: {"read off": read}}


def _rounded(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {split: {name: round(share, 3) for name, share in shares.items()} for split, shares in found.items()}


def _say(what: str) -> Callable[..., None]:
    began = time.monotonic()

    def say(step: int, loss: float, *_: nn.Module) -> None:
        if step % 50 == 0:
            logger.info("%s: step %d, loss %.3f, %.0f s", what, step, loss, time.monotonic() - began)

    return say


def tower_tensors(tower: nn.Module, state_map: StateMap) -> dict[str, Tensor]:
    """A tower's parameters under the names and in the shapes of its public checkpoints."""
    parameters, found = dict(tower.named_parameters()), {}
    for entry in state_map.entries:
        parts = parameters[entry.ours].chunk(len(entry.theirs))  # queries, keys and values are one of ours
        for name, part in zip(entry.theirs, parts, strict=True):
            found[name] = part.reshape(state_map.shape(entry, name))
    return found


_MAKERS: dict[str, Callable[[Path, int], dict[str, dict[str, Any]]]] = {
    "eva": _make_eva,
    "siglip": _make_siglip,
    "decoder": _make_decoder,
    "projector": _make_projector,
}
