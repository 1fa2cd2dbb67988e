"""media_attention's kernels against the truth: forward, gradients, tokens without an image, images without a token."""

from __future__ import annotations

import pytest
import torch
from op_truth import Case, assert_near_truth, plain_media

from megavlm_kernels import media_attention, media_schedule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs(tokens: int, images: int) -> torch.Tensor:
    """image_index of a packed row: runs in rising order, each image preceded by some tokens without one."""
    cuts = torch.sort(torch.randint(0, tokens + 1, (2 * images,))).values
    index = torch.full((tokens,), -1)
    for image in range(images):
        index[cuts[2 * image] : cuts[2 * image + 1]] = image
    return index


def case(
    device: torch.device, dtype: torch.dtype, index: torch.Tensor, images: int, latents: int, heads: int, width: int
) -> Case:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    tokens = (index.shape[0], heads, width)
    media = (images, latents, heads, width)
    return Case([draw(*tokens), draw(*media), draw(*media)], (index.to(device), width**-0.5), draw(*tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "images", "latents", "heads", "width"),
    [
        (384, 6, 64, 1, 64),  # a row of InfiMM-13B's interleaved documents, one head of eight
        (100, 3, 64, 1, 96),
        (63, 4, 7, 2, 72),
        (7, 2, 1, 1, 88),
        (1, 1, 64, 1, 112),
        (100, 2, 70, 1, 128),
        (65, 1, 16, 2, 64),
    ],
)
def test_forward_and_gradients(
    device: torch.device, dtype: torch.dtype, tokens: int, images: int, latents: int, heads: int, width: int
) -> None:
    drawn = case(device, dtype, runs(tokens, images), images, latents, heads, width)
    assert_near_truth(drawn, media_attention, plain_media)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_tokens_in_any_order(device: torch.device, index_dtype: torch.dtype) -> None:
    index = torch.randint(-1, 5, (90,), dtype=index_dtype)
    assert_near_truth(case(device, torch.float32, index, 5, 9, 2, 64), media_attention, plain_media)


def test_one_schedule_serves_several_calls(device: torch.device) -> None:
    index = torch.randint(-1, 3, (40,))
    drawn = case(device, torch.float32, index, 3, 5, 1, 64)
    shared = Case(drawn.inputs, (*drawn.others, media_schedule(index.to(device), 3, block=16)), drawn.grad_out)
    for found, expected in zip(shared.run(media_attention), drawn.run(media_attention), strict=True):
        torch.testing.assert_close(found, expected)


def test_tokens_without_image_are_exact_zeros(device: torch.device) -> None:
    index = torch.full((130,), -1)
    index[100:110] = 1
    out, grad_q, grad_k, grad_v = case(device, torch.bfloat16, index, 3, 8, 2, 64).run(media_attention)
    for by_token in (out, grad_q):
        assert (by_token[index < 0] == 0).all() and (by_token[index == 1] != 0).any()
    for by_image in (grad_k, grad_v):
        assert (by_image[[0, 2]] == 0).all() and (by_image[1] != 0).any()


@pytest.mark.parametrize(("tokens", "images"), [(70, 0), (0, 2), (0, 0), (70, 2)])
def test_nothing_attended(device: torch.device, tokens: int, images: int) -> None:
    index = torch.full((tokens,), -1)
    for found in case(device, torch.float16, index, images, 4, 2, 64).run(media_attention):
        assert (found == 0).all()


def test_images_no_token_attends_to_are_never_read(device: torch.device) -> None:
    index = torch.randint(0, 2, (80,)) * 2
    drawn = case(device, torch.float32, index, 4, 8, 1, 64)
    expected = drawn.run(media_attention)
    for source in drawn.inputs[1:]:
        source[[1, 3]] = float("nan")
    for found, before in zip(drawn.run(media_attention), expected, strict=True):
        assert torch.equal(found, before)


def test_scores_far_below_zero_leave_no_trace_of_the_padding(device: torch.device) -> None:
    drawn = case(device, torch.float32, runs(30, 2), 2, 5, 1, 64)
    q, k, v = drawn.inputs
    for found in Case([q * 0.01 + 10, k * 0.01 - 10, v], drawn.others, drawn.grad_out).run(media_attention):
        assert found.isfinite().all()


def test_same_bits_twice(device: torch.device) -> None:
    again = case(device, torch.bfloat16, runs(120, 3), 3, 16, 2, 64)
    for first, second in zip(again.run(media_attention), again.run(media_attention), strict=True):
        assert torch.equal(first, second)
