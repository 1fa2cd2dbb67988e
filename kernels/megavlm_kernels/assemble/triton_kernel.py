"""sequence_assemble in Triton: forward a gather of rows, backward a gather through the schedule, with no atomics.

Each program has a tile of rows and columns. The backward of text and features adds, for each source row, the output
gradients of the places that name it, in their order. The newline is named by hundreds of places: programs add equal
shares of its list, and a last one adds their sums in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megavlm_kernels.assemble.schedule import AssembleSchedule
from megavlm_kernels.launch import Launch, ceil_div, power_of_two

BLOCK_ELEMENTS = 4096
"""Of the output in one program: 32 per thread at four warps, so that every load is 16 bytes wide in bf16."""
MOST_PARTS = 64
"""Programs, for each stretch of columns, that share the newline's gradient."""


@triton.jit
def forward_kernel(
    text, features, newline, index, weight, out, positions, text_rows, feature_rows,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_row, is_column = position < positions, (column < WIDTH)[None, :]
    newline_tile = tl.load(newline + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for place in tl.static_range(COLUMNS):
        row = tl.load(index + position * COLUMNS + place, mask=is_row, other=-1).to(tl.int64)
        feature = row - text_rows
        is_text = (row >= 0) & (row < text_rows)
        is_feature = (feature >= 0) & (feature < feature_rows)
        is_newline = feature == feature_rows
        text_at = text + row[:, None] * WIDTH + column[None, :]
        feature_at = features + feature[:, None] * WIDTH + column[None, :]
        from_text = tl.load(text_at, mask=is_text[:, None] & is_column, other=0.0).to(tl.float32)
        from_features = tl.load(feature_at, mask=is_feature[:, None] & is_column, other=0.0).to(tl.float32)
        value = tl.where(is_text[:, None], from_text, from_features)
        value = tl.where(is_newline[:, None], newline_tile[None, :], value)
        if weight is not None:
            value *= tl.load(weight + position * COLUMNS + place, mask=is_row, other=0.0)[:, None]
        acc += value
    out_at = out + position[:, None] * WIDTH + column[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_column)


@triton.jit
def add_place(acc, order, weight, grad_out, use, keep, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Adds to each row of acc the output gradient, weighted, of the place that stands at `use` in the order."""
    place = tl.load(order + use, mask=keep, other=0)
    at = grad_out + (place // COLUMNS).to(tl.int64)[:, None] * WIDTH + column[None, :]
    value = tl.load(at, mask=keep[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)
    if weight is not None:
        value *= tl.load(weight + place, mask=keep, other=0.0)[:, None]
    return acc + value


@triton.jit
def grad_rows_kernel(
    order, starts, weight, grad_out, grad_rows, first, rows,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of `rows` source rows from `first` on: those of text, or those of features."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_row = row < rows
    begin = tl.load(starts + first + row, mask=is_row, other=0)
    end = tl.load(starts + first + row + 1, mask=is_row, other=0)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for step in range(tl.max(end - begin, 0)):
        use = begin + step
        acc = add_place(acc, order, weight, grad_out, use, use < end, column, COLUMNS, WIDTH)
    at = grad_rows + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(at, acc.to(grad_rows.dtype.element_ty), mask=is_row[:, None] & (column < WIDTH)[None, :])


@triton.jit
def newline_parts_kernel(
    order, starts, weight, grad_out, parts, first, number,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The sum over one of `number` shares of the list of source row `first`."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    begin, end = tl.load(starts + first), tl.load(starts + first + 1)
    share = (end - begin + number - 1) // number
    begin += part * share
    end = tl.minimum(begin + share, end)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for step in range(begin, end, BLOCK_ROWS):
        use = step + tl.arange(0, BLOCK_ROWS)
        acc = add_place(acc, order, weight, grad_out, use, use < end, column, COLUMNS, WIDTH)
    tl.store(parts + part * WIDTH + column, tl.sum(acc, 0), mask=column < WIDTH)


@triton.jit
def newline_kernel(parts, grad_newline, number, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_WIDTH], tl.float32)
    for part in range(number):
        total += tl.load(parts + part * WIDTH + column, mask=column < WIDTH, other=0.0)
    tl.store(grad_newline + column, total.to(grad_newline.dtype.element_ty), mask=column < WIDTH)


@dataclass(frozen=True)
class Uses:
    """What the backward reads besides the output's gradient; `columns` is that of the index."""

    schedule: AssembleSchedule
    weight: torch.Tensor | None
    columns: int

    def arguments(self) -> dict[str, torch.Tensor | None]:
        return {"order": self.schedule.order, "starts": self.schedule.starts, "weight": self.weight}


def _blocks(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, compile-time constants)."""
    block_width = power_of_two(width, 16, 512)
    block_rows = power_of_two(rows, 1, BLOCK_ELEMENTS // 512)
    constants = {"WIDTH": width, "BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width}
    return (ceil_div(rows, block_rows), ceil_div(width, block_width)), constants


def forward_launch(
    text: torch.Tensor,
    features: torch.Tensor,
    newline: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor,
) -> Launch:
    grid, constants = _blocks(*out.shape)
    arguments = {
        "text": text, "features": features, "newline": newline, "index": index, "weight": weight, "out": out,
        "positions": out.shape[0], "text_rows": text.shape[0], "feature_rows": features.shape[0],
    }  # fmt: skip
    return Launch(forward_kernel, grid, arguments, {"COLUMNS": index.shape[1], **constants}, num_warps=4, num_stages=1)


def grad_rows_launch(uses: Uses, grad_out: torch.Tensor, grad_rows: torch.Tensor, first: int) -> Launch:
    grid, constants = _blocks(*grad_rows.shape)
    arguments = {
        **uses.arguments(), "grad_out": grad_out, "grad_rows": grad_rows, "first": first, "rows": grad_rows.shape[0],
    }  # fmt: skip
    return Launch(grad_rows_kernel, grid, arguments, {"COLUMNS": uses.columns, **constants}, num_warps=4, num_stages=1)


def newline_parts_launch(uses: Uses, grad_out: torch.Tensor, parts: torch.Tensor, first: int) -> Launch:
    grid, constants = _blocks(*grad_out.shape)
    arguments = {
        **uses.arguments(), "grad_out": grad_out, "parts": parts, "first": first, "number": parts.shape[0],
    }  # fmt: skip
    return Launch(
        kernel=newline_parts_kernel,
        grid=(parts.shape[0], grid[1]),
        arguments=arguments,
        constants={"COLUMNS": uses.columns, **constants},
        num_warps=4,
        num_stages=1,
    )


def newline_launch(parts: torch.Tensor, grad_newline: torch.Tensor) -> Launch:
    width = grad_newline.shape[0]
    block = power_of_two(width, 16, 128)
    arguments = {"parts": parts, "grad_newline": grad_newline, "number": parts.shape[0]}
    constants = {"WIDTH": width, "BLOCK_WIDTH": block}
    return Launch(newline_kernel, (ceil_div(width, block),), arguments, constants, num_warps=4, num_stages=1)


def number_of_parts(positions: int) -> int:
    """At most a newline in eight positions is usual; what is decided by shape alone spares the host a wait."""
    return power_of_two(positions // 64, 1, MOST_PARTS)


def forward(
    text: torch.Tensor,
    features: torch.Tensor,
    newline: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    out = torch.empty(index.shape[0], text.shape[1], dtype=text.dtype, device=text.device)
    forward_launch(text, features, newline, index, weight, out).run()
    return out


def backward(
    uses: Uses, grad_out: torch.Tensor, text_rows: int, feature_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of text, features and newline."""
    positions, width = grad_out.shape
    grad_text, grad_features = grad_out.new_empty(text_rows, width), grad_out.new_empty(feature_rows, width)
    grad_newline = grad_out.new_empty(width)
    parts = torch.empty(number_of_parts(positions), width, dtype=torch.float32, device=grad_out.device)
    grad_rows_launch(uses, grad_out, grad_text, 0).run()
    grad_rows_launch(uses, grad_out, grad_features, text_rows).run()
    newline_parts_launch(uses, grad_out, parts, text_rows + feature_rows).run()
    newline_launch(parts, grad_newline).run()
    return grad_text, grad_features, grad_newline
