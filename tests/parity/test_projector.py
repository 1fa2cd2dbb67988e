"""The projector against transformers', at its published size, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

from megavlm.checkpoint.fresh import FreshWeights
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import check_folder, load_weights
from megavlm.model.projector import Projector, projector_state_map

ORIGINAL = ("model.mm_projector.0.", "model.mm_projector.2.")
TRANSFORMERS = ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2.")
WIDTH, HIDDEN = 12, 20


@pytest.mark.parametrize("theirs", [ORIGINAL, TRANSFORMERS])
def test_outputs_and_gradients_are_those_of_transformers(theirs: tuple[str, str], tmp_path: Path) -> None:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(hidden_size=WIDTH), text_config=Qwen2Config(hidden_size=HIDDEN)
    )
    public = LlavaOnevisionMultiModalProjector(config)
    layers = zip(theirs, (public.linear_1, public.linear_2), strict=True)
    state = {prefix + name: p.detach() for prefix, layer in layers for name, p in layer.named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    projector = Projector(WIDTH, HIDDEN)
    state_map = projector_state_map(WIDTH, HIDDEN, theirs, ours="")
    with HFFolder.open_file(tmp_path / "model.safetensors") as source:
        check_folder(source, state_map, "model.safetensors")
        load_weights([projector], source, state_map, tensor_rank=0, tensor_size=1)
    features = 3 * torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(2))
    out, expected = projector(features), public(features)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = dict(public.named_parameters())
    for name, parameter in projector.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-5, atol=1e-5)


def test_no_feature_gives_zero_gradients() -> None:
    projector = Projector(WIDTH, HIDDEN)
    projector(torch.zeros(0, WIDTH)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in projector.parameters())


def test_the_projector_of_aquila_vl_has_its_published_size() -> None:
    with torch.device("meta"):
        projector = Projector(1152, 1536)
    assert sum(parameter.numel() for parameter in projector.parameters()) == 4_131_840
    shapes = projector_state_map(1152, 1536, ORIGINAL).folder_shapes()
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 4_131_840


def test_fresh_layers_are_drawn_as_torch_draws_a_linear() -> None:
    model = torch.nn.ModuleDict({"projector": Projector(100, 400)})
    state_map = projector_state_map(100, 400, TRANSFORMERS)
    load_weights([model], FreshWeights(state_map, seed=1, std=7.0), state_map, tensor_rank=0, tensor_size=1)
    state = model.state_dict()
    for layer, columns in (("linear_1", 100), ("linear_2", 400)):
        weight = state[f"projector.{layer}.weight"]
        assert 0.99 * columns**-0.5 < weight.abs().max() <= columns**-0.5
        assert not state[f"projector.{layer}.bias"].any()
