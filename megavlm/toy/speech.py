"""A small decoder that learns to speak of the toy world from text: captions, and questions that a caption answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from megavlm.data.chat import ChatConfig
from megavlm.data.formats import Words
from megavlm.data.sample import Sample, Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.toy_world.dice import Dice
from megavlm.data.toy_world.questions import Question, more_questions, scene_and_question, text_question
from megavlm.data.toy_world.text import caption
from megavlm.data.toy_world.world import Split, ToyWorld
from megavlm.model.decoder.config import DecoderConfig

TEMPLATES = (
    ChatConfig(template="vicuna"),
    ChatConfig(template="vicuna"),
    ChatConfig(template="chatml", mask="clean"),
)
"""The formats that conversations come in, equally often."""
CAPTION_WEIGHT, QUESTION_WEIGHT = 0.2, 0.05
"""Against 1 for answers: else a decoder learns how captions go, and not to look up what it is asked for."""


LOOK_BACK = (1, 2, 4, 5)
"""How far back each head of the first layer looks at the start."""
SAME_IN_ALL, SHARPNESS = 0.3, 60.0


class Text(NamedTuple):
    """Tokens, and what each weighs as a target."""

    tokens: np.ndarray
    weights: np.ndarray


def texts(tokenizer: Tokenizer, split: Split, first: int, count: int, world: ToyWorld) -> Iterator[Text]:
    """Texts first ... first + count - 1: one in eight a caption, one in eight a question that stands alone, and all
    others questions about a caption, which stands where pictures will."""
    formats = [Words(tokenizer, template) for template in TEMPLATES]
    for number in range(first, first + count):
        dice = Dice("speech", world.seed, split, number, *world.kinds)
        share = dice.below(8)
        if share == 0:
            scene, _ = scene_and_question(dice, dice.pick(world.kinds), split, world)
            tokens, _ = tokenizer.encode_with_spans(caption(dice, scene) + tokenizer.end, surround=True)
            yield Text(tokens, np.full(len(tokens), CAPTION_WEIGHT))
        else:
            turns = _alone(dice, split, world) if share == 1 else story_turns(dice, split, world)
            encoded = dice.pick(formats).encode(Sample(str(number), (), turns))
            yield Text(encoded.tokens, np.where(encoded.targets >= 0, 1.0, QUESTION_WEIGHT))


def _alone(dice: Dice, split: Split, world: ToyWorld) -> tuple[Turn, ...]:
    return _conversation("", [text_question(dice, split, world)])


def story_turns(dice: Dice, split: Split, world: ToyWorld) -> tuple[Turn, ...]:
    """Questions about a complete caption, which begins the first of them."""
    scene, first = scene_and_question(dice, dice.pick(world.kinds), split, world)
    asked = more_questions(dice, scene, first, dice.below(world.questions), world.kinds)
    return _conversation(caption(dice, scene, complete=True) + dice.pick(("", " ")), asked)


def _conversation(before: str, asked: Sequence[Question]) -> tuple[Turn, ...]:
    turns = [turn for one in asked for turn in (Turn("user", one.text), Turn("assistant", one.answer))]
    return (Turn("user", before + turns[0].text), *turns[1:])


def padded(chosen: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """[texts, longest] tokens and weights, both zero behind a text's end."""
    longest = max(len(text.tokens) for text in chosen)
    tokens = np.zeros((len(chosen), longest), np.int64)
    weights = np.zeros((len(chosen), longest), np.float32)
    for row, text in enumerate(chosen):
        tokens[row, : len(text.tokens)] = text.tokens
        weights[row, : len(text.tokens)] = text.weights
    return torch.from_numpy(tokens), torch.from_numpy(weights)


def speech_loss(decoder: LlamaForCausalLM, chosen: Sequence[Text]) -> Tensor:
    """Weighted mean over the tokens."""
    tokens, weights = padded(chosen)
    logits = decoder(input_ids=tokens[:, :-1], use_cache=False).logits
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (each * weights).sum() / weights.sum()


@torch.no_grad()
def speech_accuracy(decoder: LlamaForCausalLM, chosen: Sequence[Text]) -> float:
    """The share of answer tokens that come first, given all before them."""
    tokens, weights = padded(chosen)
    found = decoder(input_ids=tokens[:, :-1], use_cache=False).logits.argmax(-1)
    is_answer = weights[:, 1:] == 1.0
    return float((found == tokens[:, 1:])[is_answer].float().mean())


class Lesson(NamedTuple):
    """Texts to learn from."""

    known: Sequence[Text]
    steps: int
    lr: float
    """The highest learning rate."""


def train_decoder(
    config: DecoderConfig,
    lessons: Sequence[Lesson],
    *,
    batch: int = 32,
    seed: int = 0,
    after_step: Callable[[int, float, LlamaForCausalLM], None] | None = None,
) -> LlamaForCausalLM:
    """A decoder that answers questions about what it was told."""
    torch.manual_seed(seed)
    decoder = LlamaForCausalLM(LlamaConfig(**config.to_hf("float32")))
    look_back(decoder)
    done = 0
    for cycle, (known, steps, lr) in enumerate(lessons):
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
        rng = np.random.default_rng(seed + cycle)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            with torch.autocast("cpu", torch.bfloat16):
                loss = speech_loss(decoder, _alike(known, batch, rng))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            done += 1
            if after_step is not None:
                after_step(done, loss.item(), decoder)
    return decoder


def look_back(decoder: LlamaForCausalLM) -> None:
    """Let each head of the first layer start out looking at the token that stands so and so many places before.

    `A red star at the top left`: whoever knows at `left` which colour, shape and row stand 5, 4 and 1 tokens before can
    find one by the other in a single step. From random weights 3,500 steps did not teach that; so about 1,000 do.
    """
    weights, attention = decoder.model.embed_tokens.weight.data, decoder.model.layers[0].self_attn
    # A channel that says nothing; in words of one length it is as strong in each, so that distance alone decides.
    weights[:] = F.normalize(weights) * float(weights.norm(dim=1).mean())
    weights[:, 0] = SAME_IN_ALL
    seen = SAME_IN_ALL / float(weights.square().mean(1).sqrt().mean())
    width = attention.head_dim
    half = width // 2
    turn = decoder.config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    strength = torch.where(torch.arange(half) < half // 2, SHARPNESS**0.5 / seen, 0.0)  # slow turns tell nothing apart
    for head, distance in enumerate(LOOK_BACK):
        rows = slice(head * width, (head + 1) * width)
        query = torch.cat([torch.cos(distance * turn), -torch.sin(distance * turn)]) * strength.repeat(2)
        key = torch.cat([torch.ones(half), torch.zeros(half)]) * strength.repeat(2)
        for projection, start in ((attention.q_proj, query), (attention.k_proj, key)):
            projection.weight.data[rows] = 0
            projection.weight.data[rows, 0] = start


def _alike(known: Sequence[Text], count: int, rng: np.random.Generator) -> list[Text]:
    """Some texts of much the same length, so that little of a batch is padding."""
    handful = sorted((known[place] for place in rng.integers(len(known), size=4 * count)), key=lambda t: len(t.tokens))
    begin = count * int(rng.integers(4))
    return handful[begin : begin + count]
