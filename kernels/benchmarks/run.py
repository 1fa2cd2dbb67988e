"""Times every op on one CUDA GPU at the real models' shapes, and appends the rows to results.csv.

python kernels/benchmarks/run.py [--op media_attention]

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
from pathlib import Path

import torch
import torch.nn.functional as F

import megavlm_kernels
from megavlm_kernels import gated_residual, media_attention, media_schedule, resampler_attention
from megavlm_kernels.media.reference import media_attention_reference

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = (
    *("date", "commit", "gpu", "torch", "triton", "op", "shape", "dtype", "passes", "variant"),
    *("ms_p20", "ms_p50", "ms_p80", "tflops", "gbps", "share_of_roof", "speedup_over_plain"),
)
Variant = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Work:
    """One op at one shape: `variants` take `inputs` (which get gradients); `flops` of one forward pass."""

    op: str
    shape: str
    inputs: list[torch.Tensor]
    variants: dict[str, Variant]
    flops: float
    backward_bytes: int

    def bytes(self, passes: str) -> int:
        """Each input read once, each output (of the first input's shape) written once."""
        forward = sum(tensor.nbytes for tensor in self.inputs) + self.inputs[0].nbytes
        return forward if passes == "forward" else forward + self.backward_bytes


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

    tokens, kv = rows * row_tokens, (rows * images, latents, heads, width)
    inputs = [draw(tokens, heads, width), draw(*kv), draw(*kv)]
    return Work(
        "media_attention",
        f"{name}: {rows} rows of {row_tokens} tokens, {images} images, {latents} latents, {heads}x{width}",
        inputs,
        {"kernel": kernel, "plain": plain, "best": best},
        4.0 * int((index >= 0).sum()) * latents * heads * width,
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
    return Work("gated_residual", shape, [x, y, gate], variants, flops, backward)


def works(device: str) -> Iterator[Work]:
    """The shapes of the real models, eight packed rows at a time."""
    yield resampler_work("InfiMM-Llama2-13B", 48, 257, 64, 8, 64, device)
    yield resampler_work("InfiMM-Zephyr", 48, 577, 64, 8, 64, device)
    yield resampler_work("InfiMM model card", 48, 257, 64, 16, 96, device)
    yield media_work("InfiMM-Llama2-13B", 8, 384, 6, 64, 8, 64, device)
    yield media_work("InfiMM-Zephyr", 8, 792, 6, 64, 8, 64, device)
    yield gated_work("InfiMM-Llama2-13B", 8 * 384, 5120, device)
    yield gated_work("InfiMM-Zephyr", 8 * 792, 4096, device)


def values(work: Work, variant: str, dtype: torch.dtype, grad_out: torch.Tensor) -> list[torch.Tensor]:
    """[output, gradient of each input] in float32."""
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
    for passes in ("forward", "forward+backward"):
        medians = {}
        for variant in ("plain", "best", "kernel"):
            inputs = [tensor.detach().requires_grad_(passes != "forward") for tensor in work.inputs]
            grad_out = torch.randn_like(inputs[0])

            def call(
                inputs: list[torch.Tensor] = inputs, grad_out: torch.Tensor = grad_out, name: str = variant
            ) -> None:
                result = work.variants[name](*inputs)
                if result.requires_grad:
                    torch.autograd.grad(result, inputs, grad_out)

            p20, p50, p80 = milliseconds(call)
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
    chosen = parser.parse_args().op
    if not torch.cuda.is_available():
        print("run.py times kernels on a CUDA GPU; this machine has none (resources.py needs none)", file=sys.stderr)
        return 2
    ceilings = roof()
    print(f"copy {ceilings[0] / 1e6:.0f} GB/s, bf16 product {ceilings[1] / 1e9:.0f} TFLOP/s")
    described, is_new, red = machine(), not RESULTS.exists(), []
    with RESULTS.open("a", newline="", encoding="utf-8") as file, megavlm_kernels.use("triton"):
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
