"""Patch rows: where each pixel lies, and that a matrix product over them is a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megavlm.tiles import patch_rows


def test_every_pixel_lies_where_the_contract_says() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    rows = patch_rows(images, 2)
    assert rows.shape == (2 * 2 * 3, 3 * 2 * 2)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                patch = images[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                assert rows[image * 6 + row * 3 + column].tolist() == patch.flatten().tolist()


def test_a_product_over_rows_is_the_convolution() -> None:
    images, weight = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    by_rows = patch_rows(images, 4) @ weight.flatten(1).T
    torch.testing.assert_close(by_rows.view(3, 4, 5), F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2))


def test_no_image_makes_no_row() -> None:
    assert patch_rows(torch.zeros(0, 3, 28, 28), 14).shape == (0, 588)


def test_an_image_with_a_rest_is_refused() -> None:
    with pytest.raises(AssertionError, match="28x30 holds no whole 14-patches"):
        patch_rows(torch.zeros(1, 3, 28, 30), 14)
