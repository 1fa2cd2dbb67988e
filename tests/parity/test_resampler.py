"""The perceiver resampler against a plain implementation of its formulas, and at its published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.checkpoint.fresh import FreshWeights
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import check_folder, load_weights
from megavlm.errors import ConfigError
from megavlm.export.hf_export import folder_tensors
from megavlm.model.resampler import Resampler, ResamplerConfig, resampler_state_map

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"
PREFIX = "model.perceiver."
CONFIG = ResamplerConfig(width=64)
"""That of the golden folder: all but the width as published."""


class Formulas:
    """The resampler as its formulas say, over weights under their released names, one image and one head at a time."""

    def __init__(self, state: dict[str, Tensor], config: ResamplerConfig) -> None:
        self.state, self.config = state, config

    def weight(self, name: str) -> Tensor:
        return self.state[PREFIX + name]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weight(name + ".weight") + self.weight(name + ".bias")

    def __call__(self, features: Tensor) -> Tensor:
        """[tokens, width] -> [latents, width]."""
        latents = self.weight("latents")
        for i in range(self.config.depth):
            layer = f"layers.{i}."
            latents = latents + self.attention(latents, features, layer + "0.")
            inner = self.norm(latents, layer + "1.0") @ self.weight(layer + "1.1.weight").T
            inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
            latents = latents + inner @ self.weight(layer + "1.3.weight").T
        return self.norm(latents, "norm")

    def attention(self, latents: Tensor, features: Tensor, name: str) -> Tensor:
        features, latents = self.norm(features, name + "norm_media"), self.norm(latents, name + "norm_latents")
        q = latents @ self.weight(name + "to_q.weight").T
        kv = torch.cat([features, latents]) @ self.weight(name + "to_kv.weight").T
        heads, width = [], self.config.head_width
        for first in range(0, self.config.inner_width, width):
            queries, keys = q[:, first : first + width], kv[:, first : first + width]
            values = kv[:, self.config.inner_width + first :][:, :width]
            heads.append((queries * width**-0.5 @ keys.T).softmax(-1) @ values)
        return torch.cat(heads, dim=-1) @ self.weight(name + "to_out.weight").T


def golden_state() -> dict[str, Tensor]:
    with HFFolder.open(GOLDEN) as folder:
        return {name: folder.read(name) for name in folder.names() if name.startswith(PREFIX)}


def golden_resampler(config: ResamplerConfig = CONFIG) -> Resampler:
    state_map, resampler = resampler_state_map(config), Resampler(config)
    with HFFolder.open(GOLDEN) as folder:
        check_folder(folder, state_map, str(GOLDEN), prefix=PREFIX)
        load_weights([resampler], folder, state_map, tensor_rank=0, tensor_size=1)
    return resampler


def filled(tensors: dict[str, Tensor], config: ResamplerConfig = CONFIG) -> dict[str, Tensor]:
    """Tensors under released names -> under ours."""
    return {entry.ours: tensors[name] for entry in resampler_state_map(config).entries for name in entry.theirs}


def random_features(images: int, tokens: int = 17) -> Tensor:
    return torch.randn(images, tokens, CONFIG.width, generator=torch.Generator().manual_seed(1))


def test_latents_and_gradients_are_those_of_the_formulas() -> None:
    resampler, state = golden_resampler(), golden_state()
    features, same_features = random_features(3).requires_grad_(), random_features(3).requires_grad_()
    for tensor in state.values():
        tensor.requires_grad_()
    expected = torch.stack([Formulas(state, CONFIG)(one) for one in same_features])
    latents = resampler(features)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * direction).sum().backward()
    (latents * direction).sum().backward()
    gradients = {name: tensor.grad for name, tensor in state.items() if tensor.grad is not None}
    found = {name: parameter.grad for name, parameter in resampler.named_parameters()}
    for name, wanted in (filled(gradients) | {"features": same_features.grad}).items():
        gradient = features.grad if name == "features" else found[name]
        assert gradient is not None and wanted is not None and wanted.any()
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_each_image_is_as_alone() -> None:
    resampler, features = golden_resampler(), random_features(4)
    alone = torch.cat([resampler(one[None]) for one in features])
    torch.testing.assert_close(resampler(features), alone, rtol=1e-5, atol=1e-5)


def test_no_image_gives_no_latent_and_zero_gradients() -> None:
    resampler, features = golden_resampler(), random_features(0).requires_grad_()
    latents = resampler(features)
    assert latents.shape == (0, CONFIG.num_latents, CONFIG.width)
    latents.sum().backward()
    assert features.grad is not None and features.grad.shape == features.shape
    for name, parameter in resampler.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_bfloat16_latents_are_near_those_of_float32() -> None:
    resampler, features = golden_resampler(), random_features(2)
    exact = resampler(features)
    latents = resampler.bfloat16()(features.bfloat16())
    assert latents.dtype == torch.bfloat16
    assert (latents - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("width, parameters", [(1024, 63_019_008), (1408, 112_603_392), (1792, 176_343_552)])
def test_published_resamplers_have_their_published_sizes(width: int, parameters: int) -> None:
    config = ResamplerConfig(width=width)
    with torch.device("meta"):
        resampler = Resampler(config)
    assert sum(parameter.numel() for parameter in resampler.parameters()) == parameters
    state_map = resampler_state_map(config)
    assert {entry.ours for entry in state_map.entries} == {name for name, _ in resampler.named_parameters()}
    assert sum(torch.Size(shape).numel() for shape in state_map.folder_shapes().values()) == parameters


def test_golden_tensors_come_out_bit_by_bit() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        out = dict(folder_tensors([golden_resampler()], resampler_state_map(CONFIG), dist.group.WORLD))
    finally:
        dist.destroy_process_group()
    state = golden_state()
    assert out.keys() == state.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in state.items())


def test_fresh_weights_are_drawn_as_torch_draws_them() -> None:
    model = torch.nn.ModuleDict({"resampler": Resampler(CONFIG)})
    state_map = resampler_state_map(CONFIG, ours="resampler.")
    load_weights([model], FreshWeights(state_map, seed=1, std=0.02), state_map, tensor_rank=0, tensor_size=1)
    state = model.state_dict()
    latents = state["resampler.latents"]
    assert latents.std().item() == pytest.approx(1, rel=0.05) and abs(latents.mean().item()) < 0.05
    for name, columns in (("attention.to_q", 64), ("attention.to_out", 512), ("mlp.down", 256)):
        weight = state[f"resampler.layers.3.{name}.weight"]
        bound = columns**-0.5
        assert 0.99 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert weight.std().item() == pytest.approx(torch.nn.Linear(columns, 512).weight.std().item(), rel=0.03)
    assert state["resampler.norm.weight"].eq(1).all() and state["resampler.norm.bias"].eq(0).all()
    again = FreshWeights(state_map, seed=2, std=0.02).read(PREFIX + "latents")
    assert not torch.equal(latents, again)


@pytest.mark.parametrize("field, value", [("num_latents", 0), ("heads", 0), ("width", -1), ("norm_epsilon", 0.0)])
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"ResamplerConfig\.{field} = {value}: must be .*; use"):
        CONFIG.replace(**{field: value})
