"""The choice of the next token, and which tokens end a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megavlm.checkpoint.hf_folder import eos_token_ids
from megavlm.errors import ConfigError, WeightsError
from megavlm.infer.sampling import SamplingConfig, choose_token

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = PROBABILITIES.log()


def frequencies(settings: SamplingConfig, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    chosen = [choose_token(LOGITS, settings, generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(chosen), minlength=5) / draws


def renormalised(*tokens: int) -> torch.Tensor:
    kept = torch.zeros(5)
    kept[list(tokens)] = PROBABILITIES[list(tokens)]
    return kept / kept.sum()


@pytest.mark.parametrize(
    "settings, expected",
    [
        (SamplingConfig(do_sample=False), torch.eye(5)[1]),
        (SamplingConfig(do_sample=True), PROBABILITIES),
        (SamplingConfig(do_sample=True, top_k=1), torch.eye(5)[1]),
        (SamplingConfig(do_sample=True, top_k=3), renormalised(1, 3, 4)),
        (SamplingConfig(do_sample=True, top_k=99), PROBABILITIES),
        (SamplingConfig(do_sample=True, top_p=0.01), torch.eye(5)[1]),
        (SamplingConfig(do_sample=True, top_p=0.6), renormalised(1, 3)),
        (SamplingConfig(do_sample=True, top_p=0.7), renormalised(1, 3, 4)),
        # Among the three most likely, renormalised to 0.47, 0.29 and 0.24, two reach 0.7; among all it takes three.
        (SamplingConfig(do_sample=True, top_k=3, top_p=0.7), renormalised(1, 3)),
        (SamplingConfig(do_sample=True, temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
    ],
)
def test_tokens_come_with_their_probability(settings: SamplingConfig, expected: torch.Tensor) -> None:
    found = frequencies(settings)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)  # four standard deviations
    assert not found[expected == 0].any()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_new_tokens": 0}, r"max_new_tokens = 0: must be at least 1; use for example 128"),
        ({"temperature": 0.0}, r"temperature = 0.0: must be positive; use 1.0, or leave out --do-sample"),
        ({"top_k": -1}, r"top_k = -1: must not be negative; use 0 for all tokens"),
        ({"top_p": 0.0}, r"top_p = 0.0: is no probability above 0; use 1.0 for all tokens"),
    ],
)
def test_impossible_settings(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingConfig.from_dict(wrong)


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 2}, (2, 7)),
        ({}, {"eos_token_id": 0}, (0,)),
        (None, {"eos_token_id": 3}, (3,)),
        (None, {"language": {"eos_token_id": 2}}, (2,)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_the_folder_names_the_end(
    generation: dict[str, object] | None, config: dict[str, object], expected: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(tmp_path) == expected


def test_an_end_that_is_no_token(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(WeightsError, match=r"eos_token_id = '</s>': is no token; write a number"):
        eos_token_ids(tmp_path)
