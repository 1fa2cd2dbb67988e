"""Where a toy projector starts: a patch with a thing on it becomes what the decoder makes of words about that thing.

Behind its first layer the toy decoder holds at `left` of `a red star at the top left` all four words, and looks things
up there. From random weights 350 steps taught a projector to have shapes counted, and nothing to be looked up. So 20 of
its channels start as the tower's readings of colour, shape, row and column, and hand on what the decoder's first layer
makes of these words, by least squares; all others are fresh, and faint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from megavlm.data.toy_world.dice import Dice
from megavlm.data.toy_world.labels import toy_scene
from megavlm.data.toy_world.text import caption
from megavlm.data.toy_world.world import COLOURS, COLUMNS, ROWS, SHAPES, ToyWorld
from megavlm.toy.seen import PATCH_CLASSES
from megavlm.toy.tokenizer import toy_words
from megavlm.toy.tower import Labelled, Tower, tower_features

READ = {"colour": tuple(COLOURS), "shape": SHAPES, "row": ROWS, "column": COLUMNS}
"""What is read of a patch, and the words for it."""
WORDS = tuple(word for words in READ.values() for word in words)
PLACES = (5, 4, 1, 0)
"""How far before a column's word those of colour, shape, row and column stand."""
SHARPNESS, LEAST = 12.0, 0.4
"""Of a reading, which is 1 where a patch shows what it reads and else 0; and where it begins to count."""
FAINT = 0.02


@torch.no_grad()
def word_meanings(decoder: LlamaForCausalLM, captions: int = 300) -> Tensor:
    """[WORDS, H]: what each word adds to the decoder's first layer at the end of the clause that names a thing."""
    known, told, found = toy_words(), [], []
    for number in range(captions):
        scene = toy_scene("train", number, ToyWorld(kinds=("shape",)))
        tokens, _ = known.encode_with_spans(caption(Dice("meanings", number), scene, complete=True), surround=False)
        words = [known.decode([int(token)]).strip() for token in tokens]
        states = decoder(input_ids=torch.from_numpy(tokens)[None], output_hidden_states=True).hidden_states[1][0]
        for end in range(max(PLACES), len(words)):
            clause = [words[end - before] for before in PLACES]
            if all(word in choices for word, choices in zip(clause, READ.values(), strict=True)):
                told.append([float(word in clause) for word in WORDS])
                found.append(states[end])
    return torch.linalg.lstsq(torch.tensor(told), torch.stack(found), driver="gelsd").solution


@torch.no_grad()
def patch_readings(tower: Tower, pictures: Labelled) -> Tensor:
    """[WORDS, D + 1]: least squares from the tower's features of a patch, and a one, to what it shows."""
    features = torch.cat([tower_features(tower, part)[0].flatten(0, 1) for part in pictures.pixels.split(200)])
    shows = []
    for name, words in READ.items():
        label = pictures.of_patches[:, list(PATCH_CLASSES).index(name)]
        shows.append(F.one_hot(label, max(PATCH_CLASSES.values()))[:, 1 : 1 + len(words)].float())
    known = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    return torch.linalg.lstsq(known, torch.cat(shows, dim=1)).solution.T


def speaking_projector(fresh: dict[str, Tensor], readings: Tensor, meanings: Tensor) -> dict[str, Tensor]:
    """The fresh tensors (by their names behind `multi_modal_projector.`) with those channels set."""
    made = {name: tensor.clone() for name, tensor in fresh.items()}
    count = len(WORDS)
    made["linear_1.weight"][:count] = readings[:, :-1] * SHARPNESS
    made["linear_1.bias"][:count] = (readings[:, -1] - LEAST) * SHARPNESS
    made["linear_2.weight"] *= FAINT
    made["linear_2.weight"][:, :count] = meanings.T / (LEAST * SHARPNESS)
    return made
