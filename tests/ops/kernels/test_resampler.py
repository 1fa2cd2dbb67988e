"""resampler_attention's kernels against the truth: forward, all five gradients, any lengths, the same bits twice."""

from __future__ import annotations

import pytest
import torch
from op_truth import Case, assert_near_truth, plain_resampler

from megavlm_kernels import resampler_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(device: torch.device, dtype: torch.dtype, lengths: list[int], latents: int, heads: int, width: int) -> Case:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    own = (len(lengths), latents, heads, width)
    media = (sum(lengths), heads, width)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    inputs = [draw(*own), draw(*media), draw(*media), draw(*own), draw(*own)]
    return Case(inputs, (bounds, width**-0.5), draw(*own))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "latents", "heads", "width"),
    [
        ([257, 257], 64, 1, 64),  # InfiMM-13B, one head of eight
        ([70, 5, 0, 1], 64, 1, 96),
        ([7, 63, 100], 7, 2, 64),
        ([1], 1, 3, 72),
        ([33, 2], 65, 1, 88),
        ([3, 3], 5, 1, 112),
        ([20], 3, 2, 128),
    ],
)
def test_forward_and_gradients(
    device: torch.device, dtype: torch.dtype, lengths: list[int], latents: int, heads: int, width: int
) -> None:
    assert_near_truth(case(device, dtype, lengths, latents, heads, width), resampler_attention, plain_resampler)


def test_no_images(device: torch.device) -> None:
    empty = case(device, torch.bfloat16, [], 64, 2, 64)
    assert [tuple(found.shape) for found in empty.run(resampler_attention)] == [
        (0, 64, 2, 64), (0, 64, 2, 64), (0, 2, 64), (0, 2, 64), (0, 64, 2, 64), (0, 64, 2, 64),
    ]  # fmt: skip


def test_halves_of_a_fused_projection_are_read_in_place(device: torch.device) -> None:
    """Keys and values are two halves of one projection's output: rows twice as far apart as they are long."""
    dense = case(device, torch.float32, [9, 30], 4, 2, 64)
    q, k_media, v_media, k_latents, v_latents = dense.inputs
    k_media, v_media = torch.stack([k_media, v_media], 1).unbind(1)
    k_latents, v_latents = torch.stack([k_latents, v_latents], 2).unbind(2)
    assert not k_media.is_contiguous() and not v_latents.is_contiguous()
    strided = Case([q.transpose(0, 1).contiguous().transpose(0, 1), k_media, v_media, k_latents, v_latents],
                   dense.others, dense.grad_out.transpose(2, 3).contiguous().transpose(2, 3))  # fmt: skip
    for found, expected in zip(strided.run(resampler_attention), dense.run(resampler_attention), strict=True):
        assert torch.equal(found, expected)


def test_bounds_may_be_a_view(device: torch.device) -> None:
    drawn = case(device, torch.float32, [9, 4, 30], 4, 1, 64)
    bounds, scale = drawn.others
    viewed = Case(drawn.inputs, (torch.stack([bounds, bounds * 0 + 7], 1)[:, 0], scale), drawn.grad_out)
    for found, expected in zip(viewed.run(resampler_attention), drawn.run(resampler_attention), strict=True):
        assert torch.equal(found, expected)


def test_large_scores_stay_finite(device: torch.device) -> None:
    dense = case(device, torch.float32, [40], 16, 1, 64)
    large = Case([dense.inputs[0] * 1e4, *dense.inputs[1:]], dense.others, dense.grad_out)
    for found in large.run(resampler_attention):
        assert found.isfinite().all()


def test_scores_far_below_zero_leave_no_trace_of_the_padding(device: torch.device) -> None:
    """A key beyond the end scores 0: against a softmax whose sum is 2^-1000 that would be infinite."""
    drawn = case(device, torch.float32, [20], 5, 1, 64)
    q, k_media, v_media, k_latents, v_latents = drawn.inputs
    inputs = [q * 0.01 + 10, k_media * 0.01 - 10, v_media, k_latents * 0.01 - 10, v_latents]
    for found in Case(inputs, drawn.others, drawn.grad_out).run(resampler_attention):
        assert found.isfinite().all()


def test_same_bits_twice(device: torch.device) -> None:
    again = case(device, torch.bfloat16, [50, 13], 16, 2, 64)
    for first, second in zip(again.run(resampler_attention), again.run(resampler_attention), strict=True):
        assert torch.equal(first, second)
