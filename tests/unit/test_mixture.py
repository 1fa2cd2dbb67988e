"""Mixtures in LLaVA's form: which records a strategy takes, and what is said of a wrong one."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from megavlm.data.mixture import chosen, load_mixture
from megavlm.errors import ConfigError


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
def test_first_and_end_are_slices_with_shares_rounded_up(total: int) -> None:
    records = list(range(total))
    for number in (0, 1, 5, 10_000):
        assert list(chosen(f"first:{number}", total, "a", 0)) == records[:number]
        assert list(chosen(f"end:{number}", total, "a", 0)) == (records[-number:] if number else [])
    for percent in (0, 1, 50, 99, 100):
        number = -(-percent * total // 100)
        assert list(chosen(f"first:{percent}%", total, "a", 0)) == records[:number]
    assert list(chosen("all", total, "a", 0)) == records


def test_random_is_a_choice_that_seed_and_name_decide() -> None:
    number, total = random.randrange(1, 500), 1000
    found = np.asarray(chosen(f"random:{number}", total, "a", 1))
    assert len(set(found.tolist())) == number
    assert (np.sort(found) == found).all()
    assert 0 <= found.min() <= found.max() < total
    assert np.array_equal(found, chosen(f"random:{number}", total, "a", 1))
    assert not np.array_equal(chosen("random:500", total, "a", 1), chosen("random:500", total, "a", 2))
    assert not np.array_equal(chosen("random:500", total, "a", 1), chosen("random:500", total, "b", 1))
    drawn = np.concatenate([np.asarray(chosen("random:10%", total, str(k), 1)) for k in range(200)])
    counts = np.bincount(drawn * 10 // total)  # tenths of the data set: 2000 each, give or take
    assert counts.min() > 1800
    assert counts.max() < 2200


def test_paths_start_from_the_mixture_or_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.json").touch()
    (tmp_path / "b.json").touch()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipes" / "mixture.yaml"
    path.write_text(
        "datasets:\n- json_path: a.json\n  sampling_strategy: first:50%\n- json_path: b.json\n  images: pictures\n"
    )
    first, second = load_mixture(str(path)).datasets
    assert first.json_path == str(tmp_path / "recipes" / "a.json")
    assert (second.json_path, second.images, second.sampling_strategy) == ("b.json", "pictures", "all")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("datasets: []", "Mixture.datasets"),
        ("datasets:\n- json_path: a\n  sampling_strategy: last:3", "datasets[0].sampling_strategy"),
        ("datasets:\n- json_path: a\n  sampling_strategy: first:101%", "datasets[0].sampling_strategy"),
        ("datasets:\n- json_path: a\n  sample: all", "datasets[0].sample"),
        ("datasets:\n- sampling_strategy: all", "datasets[0].json_path"),
    ],
)
def test_a_wrong_mixture_names_the_place(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_mixture(str(path))
    assert raised.value.where.endswith(where)
