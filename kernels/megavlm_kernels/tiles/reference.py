"""tile_pack in plain PyTorch: the truth that the kernel and the CPU's way are held against."""

from __future__ import annotations

import torch

CHANNELS = 3
Triple = tuple[float, float, float]


def tile_pack_reference(
    images: torch.Tensor,
    tiles: torch.Tensor,
    patch_size: int,
    patches_per_side: int,
    mean: Triple,
    std: Triple,
    border: Triple,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Arguments as in `op.tile_pack`."""
    device, side = images.device, patch_size * patches_per_side
    start, height, width, top, left = (column[:, None, None, None] for column in tiles.unbind(1))
    y = top + torch.arange(side, device=device)[:, None]
    x = left + torch.arange(side, device=device)[None, :]
    channel = torch.arange(CHANNELS, device=device)[:, None, None]
    address = start + (y * width + x) * CHANNELS + channel
    is_inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (address >= 0) & (address < images.numel())
    borders = torch.tensor(border, device=device)[:, None, None]
    pixels = torch.cat([images, images.new_zeros(1)])[torch.where(is_inside, address, images.numel())]
    values = normalise(torch.where(is_inside, pixels.float(), borders), mean, std)
    cut = values.to(dtype).unflatten(3, (patches_per_side, patch_size)).unflatten(2, (patches_per_side, patch_size))
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, CHANNELS * patch_size**2)


def normalise(values: torch.Tensor, mean: Triple, std: Triple) -> torch.Tensor:
    """[..., 3, height, width], from 0 to 255."""
    # Divisors as tensors on the device: PyTorch multiplies by the reciprocal of a number, which rounds differently.
    per_channel = torch.tensor([mean, std, (255.0,) * CHANNELS], device=values.device)[..., None, None]
    means, stds, scales = per_channel
    return (values / scales - means) / stds
