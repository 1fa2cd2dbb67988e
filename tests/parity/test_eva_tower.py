"""The EVA tower against a plain implementation of its published formulas, and at its published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eva_cases import TINY, loaded_tower, random_images, released_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import check_folder, load_weights
from megavlm.errors import WeightsError
from megavlm.model.towers.eva import EvaTower, rope_table, rope_with_class_token, rotate
from megavlm.model.towers.eva_config import EVA_TOWERS, EvaConfig
from megavlm.model.towers.eva_state_map import INFIMM_PREFIX, eva_state_map
from megavlm.tiles import patch_rows

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"


class Formulas:
    """The tower as its formulas say, over weights under their released names, one image and one head at a time."""

    def __init__(self, state: dict[str, Tensor], config: EvaConfig) -> None:
        self.state, self.config = state, config

    def weight(self, name: str) -> Tensor:
        return self.state[INFIMM_PREFIX + name]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.weight(name + ".weight") + self.weight(name + ".bias")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weight(name + ".weight").T + self.weight(name + ".bias")

    def __call__(self, image: Tensor) -> Tensor:
        """[3, size, size] -> [1 + patches, width]."""
        patch = self.config.patch_size
        maps = F.conv2d(image, self.weight("patch_embed.proj.weight"), self.weight("patch_embed.proj.bias"), patch)
        x = torch.cat([self.weight("cls_token")[0], maps.flatten(1).T]) + self.weight("pos_embed")[0]
        for i in range(self.config.depth):
            block = f"blocks.{i}."
            if self.config.post_norm:
                x = x + self.norm(self.attention(x, block + "attn."), block + "norm1")
                x = x + self.norm(self.mlp(x, block + "mlp."), block + "norm2")
            else:
                x = x + self.attention(self.norm(x, block + "norm1"), block + "attn.")
                x = x + self.mlp(self.norm(x, block + "norm2"), block + "mlp.")
        return x

    def attention(self, x: Tensor, name: str) -> Tensor:
        width, head_width = self.config.width, self.config.head_width
        if self.config.sub_norm:
            weights = [self.weight(name + f"{kind}_proj.weight") for kind in "qkv"]
        else:
            weights = list(self.weight(name + "qkv.weight").split(width))
        q, k, v = (x @ weight.T for weight in weights)
        q, v = q + self.weight(name + "q_bias"), v + self.weight(name + "v_bias")
        heads = []
        for first in range(0, width, head_width):
            queries, keys, values = (y[:, first : first + head_width] for y in (q, k, v))
            if self.config.rope:
                queries, keys = self.turn(queries), self.turn(keys)
            heads.append((queries @ keys.T * head_width**-0.5).softmax(-1) @ values)
        merged = torch.cat(heads, dim=-1)
        return self.linear(self.norm(merged, name + "inner_attn_ln") if self.config.sub_norm else merged, name + "proj")

    def turn(self, x: Tensor) -> Tensor:
        """Neighbouring channels as complex numbers, multiplied by exp(i angle); the class token as it is."""
        grid, quarter = self.config.grid, self.config.head_width // 4
        frequencies = [10000 ** (-2 * m / (2 * quarter)) for m in range(quarter)]
        places = [i / grid * self.config.rope_pretrained_grid for i in range(grid)]
        angles = [
            [places[row] * f for f in frequencies] + [places[column] * f for f in frequencies]
            for row in range(grid)
            for column in range(grid)
        ]
        pairs = torch.view_as_complex(x[1:].unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.exp(1j * torch.tensor(angles))
        return torch.cat([x[:1], torch.view_as_real(turned).flatten(1)])

    def mlp(self, x: Tensor, name: str) -> Tensor:
        if self.config.mlp == "swiglu":
            gate = self.linear(x, name + "w1")
            inner, out = gate * torch.sigmoid(gate) * self.linear(x, name + "w2"), name + "w3"
        else:
            up = self.linear(x, name + "fc1")
            inner, out = up * 0.5 * (1 + torch.erf(up / 2**0.5)), name + "fc2"
        return self.linear(self.norm(inner, name + "ffn_ln") if self.config.sub_norm else inner, out)


@pytest.mark.parametrize("kind", TINY)
def test_features_and_gradients_are_those_of_the_formulas(kind: str, tmp_path: Path) -> None:
    config = TINY[kind]
    state = released_state(config)
    tower = loaded_tower(config, state, tmp_path)
    for tensor in state.values():
        tensor.requires_grad_()
    images = random_images(config, 3)
    direction = torch.randn(3, config.tokens, config.width, generator=torch.Generator().manual_seed(2))
    expected = torch.stack([Formulas(state, config)(image) for image in images])
    features = tower(patch_rows(images, config.patch_size))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    (expected * direction).sum().backward()
    (features * direction).sum().backward()
    gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in state.items()}
    tables = eva_state_map(config).constants
    expected_gradients = dict(loaded_tower(config, {**gradients, **tables}, tmp_path).named_parameters())
    for name, parameter in tower.named_parameters():
        if name.startswith(("norm.", "head.")):
            assert parameter.grad is None and not parameter.requires_grad
            continue
        assert parameter.grad is not None, name
        difference = (parameter.grad - expected_gradients[name]).norm()
        assert difference <= 1e-5 * expected_gradients[name].norm(), name


@pytest.mark.parametrize("kind", ["L", "g", "E"])
def test_packed_images_are_as_each_alone(kind: str, tmp_path: Path) -> None:
    config = TINY[kind]
    tower = loaded_tower(config, released_state(config), tmp_path)
    rows = patch_rows(random_images(config, 4), config.patch_size)
    alone = torch.cat([tower(image) for image in rows.split(config.patches)])
    torch.testing.assert_close(tower(rows), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["L", "g", "E"])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_image_gives_no_feature_and_zero_gradients(kind: str, recompute: bool) -> None:
    config = TINY[kind]
    tower = EvaTower(config, recompute=recompute)
    rows = torch.zeros(0, config.patch_values, requires_grad=True)
    features = tower(rows)
    assert features.shape == (0, config.tokens, config.width)
    features.sum().backward()
    assert rows.grad is not None and rows.grad.shape == rows.shape
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["L", "g", "E"])
def test_recomputed_gradients_have_the_same_bits(kind: str, tmp_path: Path) -> None:
    config = TINY[kind]
    tower = loaded_tower(config, released_state(config), tmp_path)
    rows = patch_rows(random_images(config, 2), config.patch_size)
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


def test_images_of_another_size_are_no_whole_images() -> None:
    with pytest.raises(AssertionError, match="26 rows make no whole images"):
        EvaTower(TINY["L"])(torch.zeros(26, TINY["L"].patch_values))


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("EVA02-CLIP-L/14-336", 304_432_832),
        ("EVA01-CLIP-g/14-224", 1_012_588_928),
        ("EVA02-CLIP-E/14-224", 4_350_556_928),
    ],
)
def test_published_towers_have_their_published_sizes(name: str, parameters: int) -> None:
    config = EVA_TOWERS[name]
    with torch.device("meta"):
        tower = EvaTower(config)
    assert sum(parameter.numel() for parameter in tower.parameters()) == parameters
    state_map = eva_state_map(config)
    assert {entry.ours for entry in state_map.entries} == {parameter for parameter, _ in tower.named_parameters()}
    numbers = sum(torch.Size(shape).numel() for shape in state_map.folder_shapes().values())
    assert numbers == parameters


@pytest.mark.parametrize(
    "name, shape", [("EVA02-CLIP-L/14-336", (2, 577, 1024)), ("EVA02-CLIP-E/14-224", (2, 257, 1792))]
)
def test_features_at_full_size_keep_the_class_token(name: str, shape: tuple[int, ...]) -> None:
    config = EVA_TOWERS[name]
    with FakeTensorMode():
        tower = EvaTower(config)
        features = tower(torch.zeros(2 * config.patches, config.patch_values))
        features.sum().backward()
    assert features.shape == shape


@pytest.mark.parametrize("kind", ["L", "g", "E"])
def test_bfloat16_features_are_near_those_of_float32(kind: str, tmp_path: Path) -> None:
    config = TINY[kind]
    tower = loaded_tower(config, released_state(config), tmp_path)
    rows = patch_rows(random_images(config, 2), config.patch_size)
    exact = tower(rows)
    features = tower.bfloat16()(rows.bfloat16())
    assert features.dtype == torch.bfloat16
    assert (features - exact).norm() <= 0.02 * exact.norm()


def test_rotary_table_of_the_published_large_tower() -> None:
    config = EVA_TOWERS["EVA02-CLIP-L/14-336"]
    cos, sin = rope_table(config)
    assert cos.shape == sin.shape == (576, 64) and cos.dtype == sin.dtype == torch.float32
    assert (cos[0] == 1).all() and (sin[0] == 0).all()
    # The first pair of channels turns by the row, the pair at 32 by the column; the last of 24 lies at 23 * 16 / 24.
    last = torch.tensor(23 * 16 / 24)
    row_23, column_23 = 23 * 24, 23
    assert last.item() == pytest.approx(15.333, abs=1e-3)
    torch.testing.assert_close(cos[row_23, :2], last.cos().expand(2))
    torch.testing.assert_close(sin[column_23, 32:34], last.sin().expand(2))
    assert (sin[column_23, :32] == 0).all() and (sin[row_23, 32:] == 0).all()
    # Frequency m of 16 is 10000 ** (-2m / 32).
    torch.testing.assert_close(sin[row_23, 6:8], (last * 10000 ** (-6 / 32)).sin().expand(2))


def test_rotation_leaves_the_class_token_alone_and_keeps_the_number_format() -> None:
    config = TINY["L"]
    rope = rope_with_class_token(config)
    x = torch.randn(2, config.heads, config.tokens, config.head_width, dtype=torch.bfloat16)
    turned = rotate(x, rope)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    exact = rotate(x.double(), (rope[0].double(), rope[1].double()))
    # One rounding at the end, none in between.
    assert torch.equal(turned, exact.float().bfloat16())


def test_golden_folder_fills_the_tower_to_the_last_tensor() -> None:
    config = EvaConfig.from_hf(json.loads((GOLDEN / "config.json").read_text())["visual"])
    state_map = eva_state_map(config)
    with HFFolder.open(GOLDEN) as folder:
        in_file = {name for name in folder.names() if name.startswith(INFIMM_PREFIX)}
        assert in_file == state_map.folder_shapes().keys() | state_map.constants.keys()
        check_folder(folder, state_map, str(GOLDEN), prefix=INFIMM_PREFIX)
        for name, table in state_map.constants.items():
            assert torch.equal(folder.read(name), table), name
        tower = EvaTower(config)
        load_weights([tower], folder, state_map, tensor_rank=0, tensor_size=1)
        state = {name: folder.read(name) for name in in_file}
    images = random_images(config, 2)
    with torch.no_grad():
        expected = torch.stack([Formulas(state, config)(image) for image in images])
        torch.testing.assert_close(tower(patch_rows(images, config.patch_size)), expected, rtol=1e-5, atol=1e-5)


def test_a_golden_folder_of_other_positions_is_refused() -> None:
    config = EvaConfig.from_hf(json.loads((GOLDEN / "config.json").read_text())["visual"])
    with (
        HFFolder.open(GOLDEN) as folder,
        pytest.raises(WeightsError, match=r"freqs_cos = .*distance from the table.*take the folder that belongs"),
    ):
        check_folder(folder, eva_state_map(config.replace(rope_pretrained_grid=16)), "x", prefix=INFIMM_PREFIX)
