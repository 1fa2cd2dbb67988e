"""How the next token is chosen from the logits, and when a text ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megavlm.config import Config, require


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """Length of the answer and choice of its tokens."""

    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    do_sample: bool = False
    """Draw tokens by their probability; otherwise the most likely one is taken each time."""
    temperature: float = 1.0
    """The logits are divided by it before tokens are drawn."""
    top_k: int = 0
    """Draw among this many most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that together reach this probability."""
    seed: int = 1234
    """Seed of the draws; each text of a batch has its own sequence of them."""
    eos_token_ids: tuple[int, ...] | None = None
    """Tokens that end a text; none: the ones that the folder names."""

    def check(self) -> None:
        require(self.max_new_tokens >= 1, self, "max_new_tokens", "must be at least 1", "use for example 128")
        require(self.temperature > 0, self, "temperature", "must be positive", "use 1.0, or leave out --do-sample")
        require(self.top_k >= 0, self, "top_k", "must not be negative", "use 0 for all tokens")
        require(0 <= self.seed < 2**62, self, "seed", "is no seed", "use a number from 0 to 2**62")
        require(0 < self.top_p <= 1, self, "top_p", "is no probability above 0", "use 1.0 for all tokens")


def choose_token(logits: Tensor, settings: SamplingConfig, draws: torch.Generator) -> int:
    """logits [vocabulary] of one text -> the token that comes next.

    One uniform number is drawn and looked up in the cumulative probabilities, so that logits which differ by rounding
    (those of another layout) give the same token unless the number falls on a boundary.
    """
    if not settings.do_sample:
        return int(logits.argmax())
    scores, tokens = (logits.double() / settings.temperature).sort(descending=True)
    if settings.top_k:
        scores = scores[: settings.top_k]
    probabilities = scores.softmax(0)
    more_likely = probabilities.cumsum(0) - probabilities
    cumulative = probabilities[more_likely < settings.top_p].cumsum(0)
    drawn = torch.rand((), generator=draws, dtype=torch.float64) * cumulative[-1]
    return int(tokens[torch.searchsorted(cumulative, drawn, right=True)])
