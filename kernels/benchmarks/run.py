"""Times every op on one CUDA GPU at the real models' shapes, and appends the rows to results.csv.

python kernels/benchmarks/run.py [--op media_attention] [--out FILE]

Each op is checked first, and not timed where it is wrong. A row says how far it is from the roof: the time that a copy
of the same bytes or a matrix product of the same work takes on this GPU (the longer of the two, both measured in the
same run), divided by the op's median time.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import megavlm_kernels
from megavlm_kernels import (
    assemble_schedule,
    gated_residual,
    media_attention,
    media_schedule,
    resampler_attention,
    sequence_assemble,
    tile_pack,
)
from megavlm_kernels.media.reference import media_attention_reference

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = (
    *("date", "commit", "gpu", "torch", "triton", "op", "shape", "dtype", "passes", "variant"),
    *("ms_p20", "ms_p50", "ms_p80", "tflops", "gbps", "share_of_roof", "speedup_over_plain"),
)
Variant = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Work:
    """One op at one shape: `variants` take `inputs`, which get gradients unless they are pixels.

    Bytes: each input read once, each output written once; `flops` of one forward pass.
    """

    op: str
    shape: str
    inputs: list[torch.Tensor]
    variants: dict[str, Variant]
    flops: float
    forward_bytes: int
    backward_bytes: int

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "forward+backward") if self.backward_bytes else ("forward",)

    def bytes(self, passes: str) -> int:
        return self.forward_bytes if passes == "forward" else self.forward_bytes + self.backward_bytes


def like_the_first_bytes(inputs: list[torch.Tensor]) -> int:
    """In: the inputs; out: an output of the first one's shape."""
    return sum(tensor.nbytes for tensor in inputs) + inputs[0].nbytes


def attention_backward_bytes(inputs: list[torch.Tensor]) -> int:
    """In: the inputs, the output and its gradient; out: a gradient for each input."""
    return 2 * sum(tensor.nbytes for tensor in inputs) + 2 * inputs[0].nbytes


def resampler_work(name: str, images: int, tokens: int, latents: int, heads: int, width: int, device: str) -> Work:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    scale = width**-0.5
    bounds = torch.arange(images + 1, device=device, dtype=torch.int32) * tokens

    def joined(k_media: torch.Tensor, k_latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([k_media.unflatten(0, (images, tokens)), k_latents], dim=1).transpose(1, 2)

    def kernel(*given: torch.Tensor) -> torch.Tensor:
        q, k_media, v_media, k_latents, v_latents = given
        return resampler_attention(q, k_media, v_media, k_latents, v_latents, bounds, scale)

    def plain(*given: torch.Tensor) -> torch.Tensor:
        q, k_media, v_media, k_latents, v_latents = given
        scores = (q.transpose(1, 2) * scale) @ joined(k_media, k_latents).transpose(2, 3)
        return (scores.softmax(-1) @ joined(v_media, v_latents)).transpose(1, 2)

    def best(*given: torch.Tensor) -> torch.Tensor:
        q, k_media, v_media, k_latents, v_latents = given
        k, v = joined(k_media, k_latents), joined(v_media, v_latents)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale).transpose(1, 2)

    own, media = (images, latents, heads, width), (images * tokens, heads, width)
    inputs = [draw(*own), draw(*media), draw(*media), draw(*own), draw(*own)]
    return Work(
        "resampler_attention",
        f"{name}: {images} images, {tokens}+{latents} keys, {latents} latents, {heads}x{width}",
        inputs,
        {"kernel": kernel, "plain": plain, "best": best},
        4.0 * images * heads * latents * (tokens + latents) * width,
        like_the_first_bytes(inputs),
        attention_backward_bytes(inputs),
    )


def media_work(
    name: str, rows: int, row_tokens: int, images: int, latents: int, heads: int, width: int, device: str
) -> Work:
    """Each row has `images` images, the first after a few tokens; the schedule is shared by layers, so built before."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    scale = width**-0.5
    of_row = torch.arange(row_tokens, device=device) * images // row_tokens
    index = torch.cat([torch.where(torch.arange(row_tokens, device=device) < 8, -1, of_row + row * images)
                       for row in range(rows)])  # fmt: skip
    schedule = media_schedule(index, rows * images)
    # [rows, 1, tokens, images * latents], within each row: the mask that the public implementation builds.
    image_of_key = torch.arange(rows * images, device=device).unflatten(0, (rows, images)).repeat_interleave(latents, 1)
    is_other = (index.unflatten(0, (rows, row_tokens))[:, :, None] != image_of_key[:, None, :])[:, None]

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return media_attention(q, k, v, index, scale, schedule)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Row by row, as a batch: every token against every image of its row, then the mask."""
        q_rows = q.unflatten(0, (rows, row_tokens)).transpose(1, 2)
        k_rows, v_rows = (x.flatten(0, 1).unflatten(0, (rows, images * latents)).transpose(1, 2) for x in (k, v))
        scores = ((q_rows * scale) @ k_rows.transpose(2, 3)).masked_fill(is_other, torch.finfo(q.dtype).min)
        out = (scores.softmax(-1) @ v_rows).transpose(1, 2).flatten(0, 1)
        return out.masked_fill((index < 0)[:, None, None], 0.0)

    def best(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return media_attention_reference(q, k, v, index, scale)

    image_of_token = torch.where(index < 0, rows * images, index)

    def is_own_image(_: torch.Tensor, __: torch.Tensor, token: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return image_of_token[token] == key // latents

    tokens, kv = rows * row_tokens, (rows * images, latents, heads, width)
    block_mask = create_block_mask(is_own_image, None, None, tokens, rows * images * latents, device=device)
    # Compiled on a GPU alone: elsewhere it computes every score, which is enough to check it.
    attend = torch.compile(flex_attention) if device == "cuda" else flex_attention

    def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The packed rows as one sequence; blocks of another image's latents are passed over."""
        q_all, k_all, v_all = (x.transpose(0, 1)[None] for x in (q, k.flatten(0, 1), v.flatten(0, 1)))
        out = attend(q_all, k_all, v_all, block_mask=block_mask, scale=scale)
        assert isinstance(out, torch.Tensor)
        return out[0].transpose(0, 1)

    inputs = [draw(tokens, heads, width), draw(*kv), draw(*kv)]
    return Work(
        "media_attention",
        f"{name}: {rows} rows of {row_tokens} tokens, {images} images, {latents} latents, {heads}x{width}",
        inputs,
        {"kernel": kernel, "plain": plain, "best": best, "flex": flex},
        4.0 * int((index >= 0).sum()) * latents * heads * width,
        like_the_first_bytes(inputs),
        attention_backward_bytes(inputs),
    )


def gated_work(name: str, tokens: int, width: int, device: str) -> Work:
    flag = torch.ones(tokens, device=device, dtype=torch.bool)
    x, y = (torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for _ in range(2))

    def plain(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x + flag.to(x.dtype)[:, None] * y * gate.tanh()

    def kernel(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gated_residual(x, y, gate, flag)

    gate = torch.full((1,), 0.3, device=device, dtype=torch.bfloat16)
    variants: dict[str, Variant] = {"kernel": kernel, "plain": plain, "best": torch.compile(plain)}
    # Backward in: y and the output's gradient, which is x's too; out: y's gradient.
    shape, flops, backward = f"{name}: {tokens} tokens x {width}", 3.0 * tokens * width, 3 * y.nbytes
    inputs = [x, y, gate]
    return Work("gated_residual", shape, inputs, variants, flops, like_the_first_bytes(inputs), backward)


def tiles_work(name: str, images: int, grid: int, patches: int, patch: int, spare: int, device: str) -> Work:
    """Images that fill their grids, each behind its base tile; a tile is `spare` pixels wider than its patches."""
    side, half = patches * patch, (0.5, 0.5, 0.5)
    tile = side + spare
    base_bytes, image_bytes = tile**2 * 3, (1 + grid**2) * tile**2 * 3
    table = torch.tensor(
        [
            row
            for first in range(0, images * image_bytes, image_bytes)
            for row in (
                (first, tile, tile, 0, 0),
                *((first + base_bytes, grid * tile, grid * tile, y * tile, x * tile)
                  for y in range(grid) for x in range(grid)),
            )
        ],
        device=device,
    )  # fmt: skip

    def tiles_of(pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [tiles, 3, tile, tile]."""
        base, canvas = pixels.view(images, image_bytes).split([base_bytes, image_bytes - base_bytes], 1)
        in_grid = canvas.view(images, grid, tile, grid, tile, 3).transpose(2, 3).flatten(1, 2)
        return torch.cat([base.view(images, 1, tile, tile, 3), in_grid], 1).flatten(0, 1).permute(0, 3, 1, 2)

    def patch_rows_of(tiles: torch.Tensor) -> torch.Tensor:
        cut = tiles[:, :, :side, :side].unflatten(3, (patches, patch)).unflatten(2, (patches, patch))
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * patch**2)

    def kernel(pixels: torch.Tensor) -> torch.Tensor:
        return tile_pack(
            pixels, table, patch_size=patch, patches_per_side=patches, mean=half, std=half, dtype=torch.bfloat16
        )

    def plain(pixels: torch.Tensor) -> torch.Tensor:
        return patch_rows_of((tiles_of(pixels) / 255 - 0.5) / 0.5).bfloat16()

    def best(pixels: torch.Tensor) -> torch.Tensor:
        """Pixels are moved while they are bytes."""
        return patch_rows_of(tiles_of(pixels)).float().div_(127.5).sub_(1).bfloat16()

    pixels = torch.randint(0, 256, (images * image_bytes,), dtype=torch.uint8, device=device)
    values = len(table) * side**2 * 3
    return Work(
        "tile_pack",
        f"{name}: {len(table)} tiles of {patches}x{patches} patches of {patch}x{patch}",
        [pixels],
        {"kernel": kernel, "plain": plain, "best": best},
        0.0,
        # A value is a byte in and two out; the pixels beyond the last patch are not read.
        3 * values,
        0,
    )


def crops_work(name: str, images: int, width: int, patches: int, patch: int, device: str) -> Work:
    """Images already as high as the tower's square and `width` pixels wide, of which the middle is kept."""
    side, half = patches * patch, (0.5, 0.5, 0.5)
    aside, image_bytes = (width - side) // 2, side * width * 3
    table = torch.tensor([(number * image_bytes, side, width, 0, aside) for number in range(images)], device=device)

    def patch_rows_of(pixels: torch.Tensor) -> torch.Tensor:
        squares = pixels.view(images, side, width, 3)[:, :, aside : aside + side]
        cut = squares.reshape(images, patches, patch, patches, patch, 3)
        return cut.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3 * patch**2)

    def kernel(pixels: torch.Tensor) -> torch.Tensor:
        return tile_pack(
            pixels, table, patch_size=patch, patches_per_side=patches, mean=half, std=half, dtype=torch.bfloat16
        )

    def plain(pixels: torch.Tensor) -> torch.Tensor:
        return ((patch_rows_of(pixels) / 255 - 0.5) / 0.5).bfloat16()

    def best(pixels: torch.Tensor) -> torch.Tensor:
        return patch_rows_of(pixels).float().div_(127.5).sub_(1).bfloat16()

    pixels = torch.randint(0, 256, (images * image_bytes,), dtype=torch.uint8, device=device)
    shape = f"{name}: {images} crops of {patches}x{patches} patches of {patch}x{patch}"
    variants: dict[str, Variant] = {"kernel": kernel, "plain": plain, "best": best}
    return Work("tile_pack", shape, [pixels], variants, 0.0, 3 * images * side**2 * 3, 0)


def assemble_work(
    name: str, positions: int, grid: int, side: int, shrunk_side: int | None, width: int, device: str
) -> Work:
    """One image, base tile and a full grid, in the middle of text; the embedding of every position is given."""
    tile, map_side, out_side = side**2, grid * side, shrunk_side or grid * side
    tokens = tile + out_side * (out_side + 1)
    first, patch_rows = (positions - tokens) // 2, (1 + grid**2) * tile
    is_image = torch.zeros(positions, dtype=torch.bool, device=device)
    is_image[first : first + tokens] = True
    y, x = torch.arange(map_side, device=device)[:, None], torch.arange(map_side, device=device)[None, :]
    map_rows = (1 + y // side * grid + x // side) * tile + y % side * side + x % side

    def of_map(rows: torch.Tensor, closing: int) -> torch.Tensor:
        """[tokens, columns]: what stands in the base tile's rows, then in those of the map, each with its newline."""
        closed = F.pad(rows.unflatten(0, (out_side, out_side)), (0, 0, 0, 1), value=-1)
        closed[:, -1, 0] = closing
        base = F.pad(torch.arange(tile, device=device)[:, None], (0, rows.shape[1] - 1), value=-1)
        return torch.cat([base, closed.flatten(0, 1)])

    place = ((torch.arange(out_side, device=device) + 0.5) * (map_side / out_side) - 0.5).clamp(min=0)
    low = place.long()
    share = torch.stack([1 - place.frac(), place.frac()], 1)
    ends = torch.stack([low, (low + 1).clamp(max=map_side - 1)], 1)
    columns = 4 if shrunk_side else 1
    corners = map_rows[ends[:, None, :, None], ends[None, :, None, :]].flatten(2).flatten(0, 1)[:, :columns]
    sources = of_map(corners, patch_rows)
    index = torch.full((positions, columns), -1, device=device)
    index[:, 0] = torch.arange(positions, device=device)
    index[is_image] = torch.where(sources < 0, -1, sources + positions)
    weight = (index >= 0).float()
    shares = (share[:, None, :, None] * share[None, :, None, :]).flatten(2).flatten(0, 1)
    weight.masked_scatter_((index >= positions + tile) & (index < positions + patch_rows), shares[:, :columns])
    index, schedule = index.int(), assemble_schedule(index, positions + patch_rows + 1)

    def small_map(features: torch.Tensor) -> torch.Tensor:
        """[out_side, out_side, width]"""
        in_grid = features[tile:].view(grid, grid, side, side, width).permute(4, 0, 2, 1, 3)
        whole = in_grid.contiguous().flatten(1, 2).flatten(2, 3)
        return (F.interpolate(whole[None], out_side, mode="bilinear")[0] if shrunk_side else whole).permute(1, 2, 0)

    def kernel(text: torch.Tensor, features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        return sequence_assemble(text, features, newline, index, weight if shrunk_side else None, schedule)

    def plain(text: torch.Tensor, features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        closed = torch.cat([small_map(features), newline.expand(out_side, 1, width)], 1)
        packed = torch.cat([features[:tile], closed.flatten(0, 1)])
        return text.masked_scatter(is_image[:, None], packed)

    def best(text: torch.Tensor, features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        """The pieces in one copy: the text before and behind is known to be dense."""
        if not shrunk_side:
            return torch.cat([text, features, newline[None]]).index_select(0, index[:, 0])
        closed = torch.cat([small_map(features), newline.expand(out_side, 1, width)], 1)
        return torch.cat([text[:first], features[:tile], closed.flatten(0, 1), text[first + tokens :]])

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    row = 2 * width
    return Work(
        "sequence_assemble",
        f"{name}: {positions} positions, {patch_rows} patch rows, {tokens} tokens of an image, width {width}",
        [draw(positions, width), draw(patch_rows, width), draw(width)],
        {"kernel": kernel, "plain": plain, "best": best},
        2.0 * positions * columns * width,
        # Of the text only what is not an image's; in the backward all rows of text get a gradient.
        (positions - tokens + patch_rows + 1 + positions) * row + index.nbytes,
        (2 * positions + patch_rows + 1) * row + index.nbytes,
    )


def works(device: str) -> Iterator[Work]:
    """The shapes of the real models, eight packed rows at a time."""
    yield resampler_work("InfiMM-Llama2-13B", 48, 257, 64, 8, 64, device)
    yield resampler_work("InfiMM-Zephyr", 48, 577, 64, 8, 64, device)
    yield resampler_work("InfiMM model card", 48, 257, 64, 16, 96, device)
    yield media_work("InfiMM-Llama2-13B", 8, 384, 6, 64, 8, 64, device)
    yield media_work("InfiMM-Zephyr", 8, 792, 6, 64, 8, 64, device)
    yield gated_work("InfiMM-Llama2-13B", 8 * 384, 5120, device)
    yield gated_work("InfiMM-Zephyr", 8 * 792, 4096, device)
    yield tiles_work("Aquila-VL-2B, eight images", 8, 3, 27, 14, 6, device)
    yield crops_work("InfiMM-Llama2-13B", 48, 298, 16, 14, device)
    yield assemble_work("Aquila-VL-2B stage 3", 12288, 3, 27, None, 1536, device)
    yield assemble_work("Aquila-VL-2B stage 2b, map shrunk", 12288, 3, 27, 60, 1536, device)


def values(work: Work, variant: str, dtype: torch.dtype, grad_out: torch.Tensor) -> list[torch.Tensor]:
    """[output, gradient of each input] in float32."""
    if not work.backward_bytes:
        return [work.variants[variant](*work.inputs).float()]
    inputs = [tensor.to(dtype).requires_grad_() for tensor in work.inputs]
    out = work.variants[variant](*inputs)
    return [value.float() for value in (out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(dtype)))]


def faults(work: Work) -> list[str]:
    """Where the kernel is further from plain PyTorch in float32 than twice plain PyTorch in bf16, and a rounding."""
    grad_out = torch.randn_like(work.variants["plain"](*work.inputs))
    found, rough = (values(work, variant, torch.bfloat16, grad_out) for variant in ("kernel", "plain"))
    true = values(work, "plain", torch.float32, grad_out)
    lines = []
    for number, (value, plain, right) in enumerate(zip(found, rough, true, strict=True)):
        error, allowed = (value - right).abs().max(), 2 * (plain - right).abs().max()
        allowed += torch.finfo(torch.bfloat16).eps * right.abs().max()
        if not error <= allowed:
            what = "output" if number == 0 else f"gradient of input {number - 1}"
            lines.append(f"{work.op}, {work.shape}: {what} is off by {error:.2e}, allowed {allowed:.2e}; not timed")
    return lines


def milliseconds(call: Callable[[], object]) -> tuple[float, float, float]:
    """(p20, p50, p80), the L2 cache flushed before each call."""
    from triton.testing import do_bench

    return tuple(do_bench(call, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8]))


def roof() -> tuple[float, float]:
    """(bytes, bf16 operations) per millisecond of this GPU: a copy of 1 GiB, a product of two 8192 x 8192 matrices."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copying, multiplying = milliseconds(lambda: target.copy_(source))[1], milliseconds(lambda: square @ square)[1]
    return 2 * source.nbytes / copying, 2 * 8192**3 / multiplying


def run_once(variant: Variant, inputs: list[torch.Tensor], grad_out: torch.Tensor) -> None:
    out = variant(*inputs)
    if out.requires_grad:
        torch.autograd.grad(out, inputs, grad_out)


def rows_of(work: Work, ceilings: tuple[float, float]) -> Iterator[dict[str, object]]:
    """A row for each pass and variant, without what describes the machine."""
    grad_out = torch.randn_like(work.variants["plain"](*work.inputs))
    for passes in work.passes:
        medians = {}
        for variant in sorted(work.variants, key=("plain", "best", "flex", "kernel").index):
            inputs = [tensor.detach().requires_grad_(passes != "forward") for tensor in work.inputs]
            call = partial(run_once, work.variants[variant], inputs, grad_out)
            try:
                p20, p50, p80 = milliseconds(call)
            except Exception as error:  # a baseline that cannot run here must not cost the other rows
                print(f"{work.op}, {work.shape}: {variant} is not timed: {error}", file=sys.stderr)
                continue
            medians[variant] = p50
            moved = work.bytes(passes)
            # Backward products: scores again, then the gradients of weights, values, queries and keys.
            flops = work.flops if passes == "forward" else 3.5 * work.flops
            ideal = max(moved / ceilings[0], flops / ceilings[1])
            yield {
                "op": work.op, "shape": work.shape, "dtype": "bf16", "passes": passes, "variant": variant,
                "ms_p20": f"{p20:.4f}", "ms_p50": f"{p50:.4f}", "ms_p80": f"{p80:.4f}",
                "tflops": f"{flops / p50 / 1e9:.1f}", "gbps": f"{moved / p50 / 1e6:.0f}",
                "share_of_roof": f"{ideal / p50:.2f}", "speedup_over_plain": f"{medians['plain'] / p50:.2f}",
            }  # fmt: skip


def machine() -> dict[str, object]:
    import triton

    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.now(UTC).date().isoformat(), "commit": done.stdout.strip(),
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--out", type=Path, default=RESULTS, help="append to this file instead")
    arguments = parser.parse_args()
    chosen, results = arguments.op, arguments.out
    if not torch.cuda.is_available():
        print("run.py times kernels on a CUDA GPU; this machine has none (resources.py needs none)", file=sys.stderr)
        return 2
    ceilings = roof()
    print(f"copy {ceilings[0] / 1e6:.0f} GB/s, bf16 product {ceilings[1] / 1e9:.0f} TFLOP/s")
    described, is_new, red = machine(), not results.exists(), []
    with results.open("a", newline="", encoding="utf-8") as file, megavlm_kernels.use("triton"):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for work in works("cuda"):
            if chosen not in (None, work.op):
                continue
            lines = faults(work)
            red += lines
            for row in [] if lines else rows_of(work, ceilings):
                writer.writerow({**described, **row})
                file.flush()
                print(*row.values(), sep="  ")
    print(*red, sep="\n", file=sys.stderr, end="\n" if red else "")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
