"""The SigLIP tower against transformers' SiglipVisionModel, and at its published size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from siglip_cases import TINY, published, random_images, rows_of, tower_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megavlm.model.towers.siglip import SiglipTower
from megavlm.model.towers.siglip_config import SIGLIP_SO400M
from megavlm.model.towers.siglip_state_map import siglip_state_map


@pytest.mark.parametrize("kind", TINY)
def test_features_and_gradients_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    config = TINY[kind]
    theirs = published(config)
    tower = tower_of(theirs.state_dict(), config, tmp_path)
    images = random_images(config, 3)
    expected = theirs(images, output_hidden_states=True).hidden_states[-2]
    features = tower(rows_of(images, config))
    assert features.shape == (3, config.tokens, config.width)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * direction).sum().backward()
    (features * direction).sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    expected_gradients = dict(tower_of(gradients, config, tmp_path).named_parameters())
    for name, parameter in tower.named_parameters():
        if name.startswith("post_layernorm."):
            assert parameter.grad is None and not parameter.requires_grad
            continue
        assert parameter.grad is not None, name
        difference = (parameter.grad - expected_gradients[name]).norm()
        assert difference <= 1e-5 * expected_gradients[name].norm(), name


def test_pixels_of_an_incomplete_patch_are_not_seen() -> None:
    config = TINY["an edge unseen"]
    theirs = published(config)
    images = random_images(config, 1)
    changed = images.clone()
    changed[:, :, config.grid * config.patch_size :] = 9.0
    assert not torch.equal(images, changed) and torch.equal(rows_of(images, config), rows_of(changed, config))
    assert torch.equal(theirs(images).last_hidden_state, theirs(changed).last_hidden_state)


@pytest.mark.parametrize("kind", TINY)
def test_packed_images_are_as_each_alone(kind: str, tmp_path: Path) -> None:
    config = TINY[kind]
    tower = tower_of(published(config).state_dict(), config, tmp_path)
    rows = rows_of(random_images(config, 4), config)
    alone = torch.cat([tower(image) for image in rows.split(config.tokens)])
    torch.testing.assert_close(tower(rows), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_image_gives_no_feature_and_zero_gradients(recompute: bool) -> None:
    config = TINY["heads of 72"]
    tower = SiglipTower(config, recompute=recompute)
    rows = torch.zeros(0, config.patch_values, requires_grad=True)
    features = tower(rows)
    assert features.shape == (0, config.tokens, config.width)
    features.sum().backward()
    assert rows.grad is not None and rows.grad.shape == rows.shape
    trained = {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert trained.keys() == dict(tower.named_parameters()).keys() - {"post_layernorm.weight", "post_layernorm.bias"}
    for name, parameter in trained.items():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_recomputed_gradients_have_the_same_bits(tmp_path: Path) -> None:
    config = TINY["an edge unseen"]
    tower = tower_of(published(config).state_dict(), config, tmp_path)
    rows = rows_of(random_images(config, 2), config)
    gradients, kept = [], []
    saved: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    for tower.recompute in (False, True):
        tower.zero_grad()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            out = tower(rows)
        out.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None})
        kept.append(sum(saved))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert kept[1] < kept[0] / 2


def test_rows_of_another_size_are_no_whole_images() -> None:
    config = TINY["an edge unseen"]
    with pytest.raises(AssertionError, match="5 rows make no whole images"):
        SiglipTower(config)(torch.zeros(5, config.patch_values))


def test_bfloat16_features_are_near_those_of_float32(tmp_path: Path) -> None:
    config = TINY["heads of 72"]
    tower = tower_of(published(config).state_dict(), config, tmp_path)
    rows = rows_of(random_images(config, 2), config)
    exact = tower(rows)
    features = tower.bfloat16()(rows.bfloat16())
    assert features.dtype == torch.bfloat16
    assert (features - exact).norm() <= 0.02 * exact.norm()


def test_the_published_tower_has_its_published_size() -> None:
    with torch.device("meta"):
        tower = SiglipTower(SIGLIP_SO400M)
    assert sum(parameter.numel() for parameter in tower.parameters()) == 397_747_744
    state_map = siglip_state_map(SIGLIP_SO400M, "vision_model.")
    assert {entry.ours for entry in state_map.entries} == {name for name, _ in tower.named_parameters()}
    assert sum(torch.Size(shape).numel() for shape in state_map.folder_shapes().values()) == 397_747_744


def test_features_at_full_size_have_no_class_token() -> None:
    with FakeTensorMode():
        tower = SiglipTower(SIGLIP_SO400M)
        features = tower(torch.zeros(2 * 729, 588))
        features.sum().backward()
    assert features.shape == (2, 729, 1152)
