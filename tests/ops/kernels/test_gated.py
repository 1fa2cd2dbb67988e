"""gated_residual's kernels against the truth: forward, gradients, gates near zero, tokens without images."""

from __future__ import annotations

import pytest
import torch
from op_truth import Case, assert_near_truth, plain_gated

from megavlm_kernels import gated_residual

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    width: int,
    gate: float,
    gate_dtype: torch.dtype | None = None,
) -> Case:
    def draw() -> torch.Tensor:
        return torch.randn(tokens, width).to(device, dtype)

    opened = torch.tensor([gate], dtype=gate_dtype or dtype, device=device)
    return Case([draw(), draw(), opened], ((torch.rand(tokens) < 0.7).to(device),), draw())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "gate"),
    [(30, 5120, 0.3), (100, 96, 0.0), (7, 1000, -2.5), (1, 1, 0.05), (1, 4096, 30.0)],
)
def test_forward_and_gradients(device: torch.device, dtype: torch.dtype, tokens: int, width: int, gate: float) -> None:
    assert_near_truth(case(device, dtype, tokens, width, gate), gated_residual, plain_gated)


@pytest.mark.parametrize("gate", [1e-4, 0.0999, 0.1001, -0.7])
def test_gate_kept_in_float32(device: torch.device, gate: float) -> None:
    """A gate starts at zero and moves by 1e-4 a step: the result has to see it in full."""
    x, y, opened = case(device, torch.float32, 5, 32, gate).inputs
    change = gated_residual(torch.zeros_like(x), y, opened, torch.ones(5, device=device))
    torch.testing.assert_close(change, y * opened.double().tanh().float(), rtol=2e-6, atol=0)
    mixed = case(device, torch.bfloat16, 9, 64, gate, torch.float32)
    assert_near_truth(mixed, gated_residual, plain_gated)


def test_tokens_without_images_pass_unchanged(device: torch.device) -> None:
    drawn = case(device, torch.bfloat16, 40, 64, 0.8)
    (has_image,) = drawn.others
    out, grad_x, grad_y, _ = drawn.run(gated_residual)
    assert torch.equal(out[~has_image], drawn.inputs[0][~has_image])
    assert torch.equal(grad_x, drawn.grad_out)
    assert (grad_y[~has_image] == 0).all() and (grad_y[has_image] != 0).any()
    as_number = Case(drawn.inputs, (has_image.to(torch.bfloat16),), drawn.grad_out)
    assert torch.equal(as_number.run(gated_residual)[0], out)


def test_flags_may_be_a_view(device: torch.device) -> None:
    x, y, gate = case(device, torch.float32, 24, 16, 0.6).inputs
    by_sample = torch.tensor([[True, False, True]], device=device).expand(8, 3).reshape(24)
    strided = torch.stack([by_sample, ~by_sample], 1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(gated_residual(x, y, gate, strided), gated_residual(x, y, gate, by_sample))


def test_no_tokens(device: torch.device) -> None:
    out, *_, grad_gate = case(device, torch.float32, 0, 64, 0.5).run(gated_residual)
    assert out.shape == (0, 64) and grad_gate.tolist() == [0.0]


def test_same_bits_twice(device: torch.device) -> None:
    again = case(device, torch.bfloat16, 300, 200, 0.4)
    for first, second in zip(again.run(gated_residual), again.run(gated_residual), strict=True):
        assert torch.equal(first, second)
