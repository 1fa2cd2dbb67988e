"""What a decoder is shown of its images while it reads and writes a text piece by piece; they are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megavlm.batch import AttendedMedia, TextBatch, preceding_images
from megavlm.build.model import Model
from megavlm.build.run_config import AquilaVLConfig, InfiMMConfig, RunConfig
from megavlm.data.assemble_tables import spliced_batch
from megavlm.infer.prompt import Prompt
from megavlm.model.aquila_vl.model import AquilaVL
from megavlm.model.infimm.model import InfiMM, MediaInput
from megavlm.parallel.groups import Groups

Seen = Callable[[Tensor, int], dict[str, Any]]
"""(the next tokens [b, s] of every row, the place of the first) -> what the decoder's forward takes beside them."""


def what_is_seen(model: Model, run: RunConfig, groups: Groups, prompts: Sequence[Prompt], length: int) -> Seen:
    """For texts that begin with these prompts and grow up to this length."""
    if run.infimm is not None:
        return _attended(model, run.infimm, groups, prompts, length)
    if run.aquila_vl is not None:
        return _spliced(model, run.aquila_vl, groups, prompts)
    return lambda piece, start: {}


def _attended(model: Model, parts: InfiMMConfig, groups: Groups, prompts: Sequence[Prompt], length: int) -> Seen:
    """The latents of all images, and which one each token sees.

    Behind its prompt a row goes on seeing its last image, whatever tokens are chosen.
    """
    assert model.inputs is not None
    (chunk,) = model.chunks
    assert isinstance(chunk, InfiMM)
    image_of_token = torch.full((len(prompts), length), -1)
    has_image = torch.zeros_like(image_of_token, dtype=torch.bool)
    images = 0
    for row, prompt in enumerate(prompts):
        (of_prompt,), _ = preceding_images(prompt.tokens.unsqueeze(0), parts.image_token_id, [prompt.images])
        seen = torch.cat([of_prompt, of_prompt[-1:].expand(length - len(of_prompt))])
        image_of_token[row] = torch.where(seen < 0, -1, seen + images)
        has_image[row] = prompt.images > 0
        images += prompt.images
    patches = _patches(prompts, 3 * parts.tower.patch_size**2)
    media = AttendedMedia(patches, (1,) * images, image_of_token=image_of_token, has_image=has_image)
    tokens = torch.zeros_like(image_of_token)
    batch = TextBatch(tokens, tokens, torch.zeros(tokens.shape), media=media).to(groups.device)
    asked: MediaInput = model.inputs([batch])(batch)["media"]
    latents = chunk.media_latents(asked)
    return lambda piece, start: {
        "media": MediaInput(asked.token_map[:, start : start + piece.size(1)], images, latents=latents)
    }


def _spliced(model: Model, parts: AquilaVLConfig, groups: Groups, prompts: Sequence[Prompt]) -> Seen:
    """The embeddings of all prompts, images in their places; behind its prompt a row is its tokens' embeddings."""
    assert model.inputs is not None
    (chunk,) = model.chunks
    assert isinstance(chunk, AquilaVL)
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts], device=groups.device)
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    is_image = torch.zeros_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
        is_image[row, : len(prompt.tokens)] = torch.isin(prompt.tokens, torch.tensor(parts.placeholders))
    plans = [plan for prompt in prompts for plan in prompt.plans]
    patches = _patches(prompts, parts.tower.patch_values)
    batch = spliced_batch(tokens, tokens, is_image.numpy(), plans, patches).to(groups.device)
    embedded = chunk.embed(batch.tokens, model.inputs([batch])(batch)["media"])

    def seen(piece: Tensor, start: int) -> dict[str, Any]:
        if start >= embedded.size(0):
            return {}
        of_prompt = embedded[start : start + piece.size(1)]
        written = (start >= lengths).view(1, -1, 1)
        return {"decoder_input": torch.where(written, chunk.embedding(piece, None), of_prompt)}

    return seen


def _patches(prompts: Sequence[Prompt], values: int) -> Tensor:
    return torch.cat([torch.empty(0, values), *(prompt.patches for prompt in prompts if prompt.patches is not None)])
