"""Text from a model: one token after another, with the keys, the values and the images of what was read kept.

The texts of a batch begin together. All prompts are read at once up to the end of the shortest, then every row takes
one token at a time: from its prompt while that lasts, and of its own choice afterwards. So there is no padding and
nothing to mask, each row is exactly what it would be alone, and the price of prompts of different lengths is one
step for each token between the shortest and the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megavlm.build.model import Model
from megavlm.build.run_config import RunConfig
from megavlm.checkpoint.hf_folder import eos_token_ids
from megavlm.errors import ConfigError, DataError, LayoutError
from megavlm.infer.prompt import Prompt
from megavlm.infer.sampling import SamplingConfig, choose_token
from megavlm.infer.seen import what_is_seen
from megavlm.model.kv_cache import CachedDecoder
from megavlm.parallel.groups import Groups


@torch.no_grad()
def generate(
    model: Model, run: RunConfig, groups: Groups, prompts: Sequence[Prompt], settings: SamplingConfig
) -> list[list[int]]:
    """The new tokens of each prompt, the one that ended it included; the same on every rank."""
    check_generation(run, prompts, settings)
    (chunk,) = model.chunks
    ends = settings.eos_token_ids
    if ends is None:
        ends = () if run.weights.load_hf is None else eos_token_ids(run.weights.load_hf)
    texts = _Texts(prompts, settings, ends)
    with _evaluating(chunk):
        decoder = CachedDecoder(chunk, *texts.tokens.shape)
        seen = what_is_seen(model, run, groups, prompts, texts.tokens.size(1))
        start, stop = 0, min(len(prompt.tokens) for prompt in prompts)
        while not texts.done:
            piece = texts.tokens[:, start:stop].to(groups.device)
            logits = decoder.read(piece, **seen(piece, start))
            texts.go_on(stop, logits[:, : run.decoder.vocab_size].float().cpu())
            start, stop = stop, stop + 1
    return texts.answers


def check_generation(run: RunConfig, prompts: Sequence[Prompt], settings: SamplingConfig) -> None:
    """Refuse a layout without a cache, and prompts that the model cannot take."""
    check_generation_layout(run)
    limit = run.decoder.longest_text
    for number, prompt in enumerate(prompts):
        where, length = f"prompt {number}", len(prompt.tokens)
        if length == 0:
            raise DataError(f"{where}: tokens", length, "there is nothing to go on with", "write at least one word")
        if length + settings.max_new_tokens > limit:
            raise ConfigError(
                "max_new_tokens",
                settings.max_new_tokens,
                f"with the {length} tokens of {where} goes beyond the decoder's {limit} positions",
                f"use at most {limit - length}" if length < limit else "shorten the prompt",
            )
        largest = int(prompt.tokens.max())
        if largest >= run.decoder.vocab_size:
            raise DataError(
                f"{where}: token",
                largest,
                f"the decoder has {run.decoder.vocab_size} tokens",
                "take the tokenizer of the model's own folder",
            )
        if run.infimm is None and run.aquila_vl is None and prompt.images:
            raise DataError(f"{where}: images", prompt.images, "the model is a decoder alone", "leave the images out")


def check_generation_layout(run: RunConfig) -> None:
    """Refuse pipeline stages and sequence parallelism, which do not fit one token at a time."""
    if run.parallel.pipeline_model_parallel_size > 1:
        raise LayoutError(
            "parallel.pipeline_model_parallel_size",
            run.parallel.pipeline_model_parallel_size,
            "text is not generated through pipeline stages",
            "use tensor parallelism instead (--tensor-model-parallel-size)",
        )
    if run.parallel.sequence_parallel and run.parallel.tensor_model_parallel_size > 1:
        raise LayoutError(
            "parallel.sequence_parallel",
            True,
            "a single token does not divide over ranks",
            "build the model that generates without it",
        )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


class _Texts:
    """The rows of a batch as they grow."""

    def __init__(self, prompts: Sequence[Prompt], settings: SamplingConfig, ends: Sequence[int]) -> None:
        self.settings, self.ends = settings, ends
        self.prompt_lengths = [len(prompt.tokens) for prompt in prompts]
        self.tokens = torch.zeros(len(prompts), max(self.prompt_lengths) + settings.max_new_tokens, dtype=torch.int64)
        for row, prompt in zip(self.tokens, prompts, strict=True):
            row[: len(prompt.tokens)] = prompt.tokens
        self.answers: list[list[int]] = [[] for _ in prompts]
        # A text's draws do not depend on its neighbours in the batch.
        self.draws = [torch.Generator().manual_seed(settings.seed + row) for row in range(len(prompts))]

    @property
    def done(self) -> bool:
        return all(map(self._is_finished, self.answers))

    def _is_finished(self, answer: list[int]) -> bool:
        return len(answer) == self.settings.max_new_tokens or (len(answer) > 0 and answer[-1] in self.ends)

    def go_on(self, position: int, logits: Tensor) -> None:
        """Choose the token at this position, from logits [b, vocabulary], of each row whose prompt ends before it."""
        for row, answer in enumerate(self.answers):
            if position >= self.prompt_lengths[row] and not self._is_finished(answer):
                answer.append(choose_token(logits[row], self.settings, self.draws[row]))
                self.tokens[row, position] = answer[-1]
