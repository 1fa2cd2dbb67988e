"""The counted cost of the towers against torch's own count."""

from __future__ import annotations

import pytest
import torch
from eva_cases import TINY
from siglip_cases import TINY as SIGLIP_TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.model.flops import eva_flops, siglip_flops
from megavlm.model.towers.eva import EvaTower
from megavlm.model.towers.siglip import SiglipTower


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_eva_flops_are_those_torch_counts(kind: str, images: int) -> None:
    config = TINY[kind]
    tower = EvaTower(config)
    # torch counts the products inside the plain attention kernel, and not those of the CPU's fused one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(images * config.patches, config.patch_values))
    assert counter.get_total_flops() == eva_flops(config, images).forward


@pytest.mark.parametrize("kind", SIGLIP_TINY)
@pytest.mark.parametrize("images", [0, 2])
def test_siglip_flops_are_those_torch_counts(kind: str, images: int) -> None:
    config = SIGLIP_TINY[kind]
    tower = SiglipTower(config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(images * config.tokens, config.patch_values))
    assert counter.get_total_flops() == siglip_flops(config, images).forward
