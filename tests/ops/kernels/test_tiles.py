"""tile_pack's kernel against the truth, bit by bit: tiles inside, across and beyond their images, any patch size."""

from __future__ import annotations

import pytest
import torch
from op_truth import plain_tiles

from megavlm_kernels import tile_pack
from megavlm_kernels.tiles.reference import tile_pack_reference
from megavlm_kernels.tiles.triton_kernel import Normal, forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = (0.5, 0.5, 0.5)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def drawn(sizes: list[tuple[int, int]], tiles: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, table): every tile of a random image, from wholly before it to wholly behind it."""
    bytes_of = torch.tensor([height * width * 3 for height, width in sizes])
    firsts = bytes_of.cumsum(0) - bytes_of
    chosen = torch.randint(0, len(sizes), (tiles,))
    height, width = torch.tensor(sizes)[chosen].unbind(1)
    top, left = (torch.randint(-side, int(edge.max()) + 1, (tiles,)) for edge in (height, width))
    images = torch.randint(0, 256, (int(bytes_of.sum()),), dtype=torch.uint8)
    return images, torch.stack([firsts[chosen], height, width, top, left], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "tiles", "patch_size", "patches_per_side"),
    [
        ([(384, 384), (300, 512)], 1, 14, 27),  # a tile of Aquila-VL-2B
        ([(63, 100), (1, 1), (7, 63)], 9, 14, 2),
        ([(1, 100)], 5, 7, 1),
        ([(9, 5), (3, 3)], 20, 1, 3),
        ([(40, 30)], 4, 5, 7),
    ],
)
def test_equal_to_the_truth(
    device: torch.device,
    dtype: torch.dtype,
    sizes: list[tuple[int, int]],
    tiles: int,
    patch_size: int,
    patches_per_side: int,
) -> None:
    images, table = (given.to(device) for given in drawn(sizes, tiles, patch_size * patches_per_side))
    for (mean, std), border in (((HALF, HALF), (0, 0, 0)), (CLIP, (122, 116, 104))):
        found = tile_pack(
            images,
            table,
            patch_size=patch_size,
            patches_per_side=patches_per_side,
            mean=mean,
            std=std,
            border=border,
            dtype=dtype,
        )
        expected = plain_tiles(images, table, patch_size, patches_per_side, mean, std, border)
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def pack_one_patch(images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return tile_pack(images, table, patch_size=2, patches_per_side=1, mean=HALF, std=HALF)


def test_every_byte_is_divided_exactly(device: torch.device) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).to(device)
    table = torch.tensor([[0, 16, 16, 0, 0]]).to(device)
    mean, std = CLIP
    found = tile_pack(images, table, patch_size=16, patches_per_side=1, mean=mean, std=std)
    expected = plain_tiles(images, table, 16, 1, mean, std, (0, 0, 0))
    assert torch.equal(found, expected)


def test_pixels_beyond_the_buffer_count_as_outside(device: torch.device) -> None:
    """On a GPU the table is not read back; memory that is not the images' may then not be read."""
    images = torch.full((12,), 255, dtype=torch.uint8, device=device)
    table = torch.tensor([[-6, 2, 2, 0, 0], [6, 2, 2, 0, 0], [1 << 40, 2, 2, 0, 0]], device=device)
    found = forward(images, table, 2, 1, Normal(HALF, HALF, (0, 0, 0)), torch.float32)
    assert torch.equal(found, tile_pack_reference(images, table, 2, 1, HALF, HALF, (0, 0, 0), torch.float32))
    assert (found == 1).sum(1).tolist() == [6, 6, 0]


def test_no_tiles(device: torch.device) -> None:
    table = torch.zeros(0, 5, dtype=torch.int64, device=device)
    assert pack_one_patch(torch.zeros(0, dtype=torch.uint8, device=device), table).shape == (0, 12)


def test_arguments_may_be_views(device: torch.device) -> None:
    images, table = (given.to(device) for given in drawn([(5, 6), (3, 4)], 6, 2))
    spread_images, spread_table = torch.stack([images, images + 1], 1)[:, 0], torch.stack([table, -table], 2)[..., 0]
    assert not spread_images.is_contiguous() and not spread_table.is_contiguous()
    assert torch.equal(pack_one_patch(spread_images, spread_table), pack_one_patch(images, table))


def test_same_bits_twice(device: torch.device) -> None:
    images, table = (given.to(device) for given in drawn([(50, 60), (30, 40)], 6, 2))
    assert torch.equal(pack_one_patch(images, table), pack_one_patch(images, table))
