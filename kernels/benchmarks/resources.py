"""What each kernel asks of a chip, compiled for sm_80 and sm_90 at the real models' shapes; no GPU needed.

python kernels/benchmarks/resources.py             prints the table
python kernels/benchmarks/resources.py --check     fails where a number is worse than in kernels/resources.csv
python kernels/benchmarks/resources.py --update    rewrites that file: a deliberate change

Run it without TRITON_INTERPRET. Block sizes stand as tokens x width or queries x keys.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).resolve().parents[1] / "resources.csv"
CHIPS = ("sm_80", "sm_90")
KEY = ("op", "kernel", "chip", "width")
"""`width` is that of a head; of a row for the ops without heads."""
SETTINGS = ("blocks", "warps", "stages")
NUMBERS = ("registers", "spill_bytes", "shared_bytes")
COLUMNS = (*KEY, *SETTINGS, *NUMBERS, "triton")
MOST_SHARED = {"sm_80": 160 * 1024, "sm_90": 227 * 1024}

HEADS = ((64, 8), (96, 16), (88, 16))
"""(head dim, heads): InfiMM's released code, its model card, and a width that is no multiple of 16."""
LATENTS = 64
IMAGES = 48
"""Eight rows of six images."""
MEDIA_TOKENS = 257
TOKENS = 8 * 384
MODEL_WIDTHS = (4096, 5120)
AQUILA_WIDTHS = (1536, 1152)
"""Of Aquila-VL-2B's decoder and its tower."""
PATCH, PER_SIDE = 14, 27
AQUILA_TILES = 10
AQUILA_POSITIONS = 12288
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def shaped(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without data: compiling needs shapes and types alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def resampler_launches(width: int, heads: int, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    from megavlm_kernels.resampler import triton_kernel as kernels

    own = shaped(IMAGES, LATENTS, heads, width, dtype=dtype)
    media = shaped(IMAGES * MEDIA_TOKENS, heads, width, dtype=dtype)
    bounds = shaped(IMAGES + 1, dtype=torch.int32)
    inputs = kernels.Inputs.of(own, media, media, own, own, bounds, width**-0.5)
    rows, statistics = inputs.q, shaped(heads, inputs.q.shape[0], dtype=torch.float32)
    yield "forward", kernels.forward_launch(inputs, rows, statistics)
    yield "grad_q", kernels.grad_q_launch(inputs, rows, rows, statistics, statistics, rows)
    for source, keys in (("media", media), ("latents", rows)):
        launch = kernels.grad_kv_launch(inputs, source, rows, statistics, statistics, keys, keys)
        yield f"grad_kv {source}", launch


def media_launches(width: int, heads: int, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    from megavlm_kernels.media import triton_kernel as kernels
    from megavlm_kernels.media.schedule import media_schedule

    q, kv = shaped(TOKENS, heads, width, dtype=dtype), shaped(IMAGES, LATENTS, heads, width, dtype=dtype)
    schedule = media_schedule(shaped(TOKENS, dtype=torch.int32), IMAGES)
    inputs = kernels.Inputs.of(q, kv, kv, schedule, width**-0.5)
    statistics = shaped(heads, TOKENS, dtype=torch.float32)
    yield "forward", kernels.forward_launch(inputs, q, statistics)
    yield "grad_q", kernels.grad_q_launch(inputs, q, q, statistics, statistics, q)
    yield "grad_kv", kernels.grad_kv_launch(inputs, q, statistics, statistics, inputs.k, inputs.v)


def gated_launches(width: int, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    from megavlm_kernels.gated import triton_kernel as kernels

    x, gate, flag = shaped(TOKENS, width, dtype=dtype), shaped(1, dtype=dtype), shaped(TOKENS, dtype=torch.bool)
    parts = shaped(kernels.number_of_parts(TOKENS, width), dtype=torch.float32)
    yield "forward", kernels.forward_launch(x, x, gate, flag, x)
    yield "backward", kernels.backward_launch(x, gate, flag, x, x, parts)
    yield "grad_gate", kernels.grad_gate_launch(parts, gate, gate)


def tiles_launches(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    from megavlm_kernels.tiles import triton_kernel as kernels

    images, table = shaped(AQUILA_TILES * 384 * 384 * 3, dtype=torch.uint8), shaped(AQUILA_TILES, 5, dtype=torch.int64)
    out, half = shaped(AQUILA_TILES * PER_SIDE**2, 3 * PATCH**2, dtype=dtype), (0.5, 0.5, 0.5)
    normal = kernels.Normal(mean=half, std=half, border=(0, 0, 0))
    yield "forward", kernels.forward_launch(images, table, out, PATCH, PER_SIDE, normal)


def assemble_launches(width: int, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Copies through one column, and mixes of four."""
    from megavlm_kernels.assemble import triton_kernel as kernels
    from megavlm_kernels.assemble.schedule import assemble_schedule

    rows, features = (
        shaped(AQUILA_POSITIONS, width, dtype=dtype),
        shaped(AQUILA_TILES * PER_SIDE**2, width, dtype=dtype),
    )
    parts = shaped(kernels.number_of_parts(AQUILA_POSITIONS), width, dtype=torch.float32)
    first = AQUILA_POSITIONS + len(features)
    for name, columns in (("copy", 1), ("mix", 4)):
        index = shaped(AQUILA_POSITIONS, columns, dtype=torch.int32)
        weight = None if columns == 1 else shaped(AQUILA_POSITIONS, columns, dtype=torch.float32)
        uses = kernels.Uses(assemble_schedule(index, first + 1), weight, columns)
        yield f"forward {name}", kernels.forward_launch(rows, features, rows[0], index, weight, rows)
        yield f"grad_rows {name}", kernels.grad_rows_launch(uses, rows, features, AQUILA_POSITIONS)
        yield f"newline_parts {name}", kernels.newline_parts_launch(uses, rows, parts, first)
    yield "newline", kernels.newline_launch(parts, rows[0])


def launches(dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, str, int, Any]]:
    """(op, kernel, width, launch) of every kernel at every real shape."""
    for width, heads in HEADS:
        for kernel, launch in resampler_launches(width, heads, dtype):
            yield "resampler_attention", kernel, width, launch
        for kernel, launch in media_launches(width, heads, dtype):
            yield "media_attention", kernel, width, launch
    for width in MODEL_WIDTHS:
        for kernel, launch in gated_launches(width, dtype):
            yield "gated_residual", kernel, width, launch
    for kernel, launch in tiles_launches(dtype):
        yield "tile_pack", kernel, 3 * PATCH**2, launch
    for width in AQUILA_WIDTHS:
        for kernel, launch in assemble_launches(width, dtype):
            yield "sequence_assemble", kernel, width, launch


def compiled(launch: Any, chip: str) -> Any:
    """The launch compiled as Triton's own call would on that chip: aligned pointers, ones and None as constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, dict(launch.constants), {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif name in launch.constants or value is None or value == 1:
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or (signature[name] == "i32" and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", int(chip.removeprefix("sm_")), 32), options=options)


def registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes it keeps on the stack for want of registers), as cuobjdump reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def measured() -> list[dict[str, str]]:
    """The table as this tree compiles."""
    import triton

    rows = []
    for op, kernel, width, launch in launches():
        blocks = "x".join(str(value) for name, value in launch.constants.items() if name.startswith("BLOCK"))
        for chip in CHIPS:
            result = compiled(launch, chip)
            registers, spills = registers_and_spills(result.asm["cubin"])
            values = (op, kernel, chip, width, blocks, launch.num_warps, launch.num_stages)
            numbers = (registers, spills, result.metadata.shared, triton.__version__)
            rows.append(dict(zip(COLUMNS, map(str, (*values, *numbers)), strict=True)))
    return rows


def complaints(found: list[dict[str, str]], table: list[dict[str, str]]) -> list[str]:
    """What is over a limit, or worse than in the table; numbers of another Triton are not compared."""

    def by_key(rows: list[dict[str, str]]) -> dict[str, dict[str, str]]:
        return {" ".join(row[name] for name in KEY): row for row in rows}

    known, lines = by_key(table), []
    for key, row in by_key(found).items():
        if int(row["spill_bytes"]):
            lines.append(f"{key}: spills {row['spill_bytes']} bytes; use smaller blocks")
        if int(row["shared_bytes"]) > MOST_SHARED[row["chip"]]:
            lines.append(f"{key}: {row['shared_bytes']} bytes of shared memory, at most {MOST_SHARED[row['chip']]}")
        before = known.pop(key, None)
        if before is None:
            lines.append(f"{key}: not in {TABLE.name}; run resources.py --update")
        elif before["triton"] == row["triton"]:
            lines += [
                f"{key}: {name} {row[name]}, in {TABLE.name} {before[name]}; run resources.py --update if that is meant"
                for name in (*SETTINGS, *NUMBERS)
                if (int(row[name]) > int(before[name]) if name in NUMBERS else row[name] != before[name])
            ]
    return lines + [f"{key}: in {TABLE.name} only; run resources.py --update" for key in known]


def read_table() -> list[dict[str, str]]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(rows: list[dict[str, str]], file: Any) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="compare with the committed table")
    choice.add_argument("--update", action="store_true", help="rewrite the committed table")
    arguments = parser.parse_args()
    rows = measured()
    if arguments.update:
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            write_table(rows, file)
    write_table(rows, sys.stdout)
    lines = complaints(rows, read_table()) if arguments.check else []
    print(*lines, sep="\n", file=sys.stderr, end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
