"""What the training loop tells of itself: how it starts, and what each step computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megavlm.build.model import Model
from megavlm.build.run_config import RunConfig
from megavlm.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The global batch in numbers, summed over data-parallel ranks."""

    samples: int
    """Those left out for their length included."""
    rows: int
    tokens: int
    """Without padding."""
    row_tokens: int
    """With padding: what is computed."""
    target_tokens: int
    """Tokens that count in the loss."""
    images: int
    """Pictures and videos."""
    tiles: int
    """What the tower sees of them."""
    seeing_tokens: int
    """Tokens of samples with a picture."""
    squared_lengths: int
    """Sum over packed documents of the square of their tokens: what attention's cost grows with."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did. The same on every rank, but for the losses, which the rank that speaks is sure to know."""

    iteration: int
    """Counted from 1."""
    train_iters: int
    consumed_samples: int
    losses: Mapping[str, float]
    """"lm loss" first; then "lm loss/NAME" of each source of data, where there are several."""
    learning_rates: Mapping[str, float]
    """That of the run under "", and by part where it has another one."""
    grad_norm: float
    applied: bool
    """Whether the weights were changed."""
    skipped: int
    """Steps so far of this start of the run that did not change them."""
    nan: int
    """Of these, for a loss or gradient that was not finite."""
    seconds: float
    """The whole step by the clock."""
    waited: float
    """Of these, for data."""
    work: StepWork


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What is known before the first step."""

    run: RunConfig
    groups: Groups
    model: Model
    first_iteration: int
    """Counted from 1: the one behind the checkpoint that the run goes on from."""
