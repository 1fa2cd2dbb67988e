"""sequence_assemble's kernels against the truth: copies and mixes, all gradients, rows unused or used by thousands."""

from __future__ import annotations

import pytest
import torch
from op_truth import Case, assert_near_truth, plain_assemble

from megavlm_kernels import assemble_schedule, sequence_assemble
from megavlm_kernels.assemble.reference import sequence_assemble_reference
from megavlm_kernels.assemble.triton_kernel import forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(
    device: torch.device,
    dtype: torch.dtype,
    positions: int,
    text_rows: int,
    feature_rows: int,
    columns: int,
    width: int,
    index_dtype: torch.dtype = torch.int32,
) -> Case:
    """Sources at random, one in eight the newline and one in eight none; weights of columns that sum to one."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    newline = text_rows + feature_rows
    index = torch.randint(0, newline + 1, (positions, columns), dtype=index_dtype)
    chance = torch.rand(positions, columns)
    index = torch.where(chance < 1 / 8, -1, torch.where(chance > 7 / 8, newline, index)).to(index_dtype)
    weight = None if columns == 1 else torch.rand(positions, columns).softmax(1).to(device)
    inputs = [draw(text_rows, width), draw(feature_rows, width), draw(width)]
    return Case(inputs, (index.to(device), weight), draw(positions, width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("positions", "text_rows", "feature_rows", "columns", "width"),
    [
        (200, 40, 150, 4, 1536),  # rows of Aquila-VL-2B
        (100, 100, 63, 1, 1152),
        (63, 7, 100, 4, 100),
        (7, 1, 3, 2, 600),
        (1, 1, 1, 3, 1),
        (300, 5, 0, 1, 33),
        (70, 0, 9, 4, 17),
    ],
)
def test_forward_and_gradients(
    device: torch.device,
    dtype: torch.dtype,
    positions: int,
    text_rows: int,
    feature_rows: int,
    columns: int,
    width: int,
) -> None:
    drawn = case(device, dtype, positions, text_rows, feature_rows, columns, width)
    assert_near_truth(drawn, sequence_assemble, plain_assemble)


def test_one_column_is_a_copy(device: torch.device) -> None:
    drawn = case(device, torch.bfloat16, 90, 30, 40, 1, 200)
    out, *_ = drawn.run(sequence_assemble)
    index = drawn.others[0][:, 0].long()
    rows = torch.cat([*drawn.inputs[:2], drawn.inputs[2][None], torch.zeros_like(out[:1])])
    assert torch.equal(out, rows[index])


def test_rows_without_a_use_get_zeros(device: torch.device) -> None:
    drawn = case(device, torch.float16, 50, 20, 20, 4, 48)
    index = torch.where(drawn.others[0] % 2 == 0, drawn.others[0], -1)
    _, grad_text, grad_features, _ = Case(drawn.inputs, (index, drawn.others[1]), drawn.grad_out).run(sequence_assemble)
    for gradient in (grad_text, grad_features):
        assert (gradient[1::2] == 0).all() and (gradient[::2] != 0).any()


@pytest.mark.parametrize(("positions", "feature_rows"), [(0, 5), (0, 0), (9, 0)])
def test_nothing_named(device: torch.device, positions: int, feature_rows: int) -> None:
    drawn = case(device, torch.float32, positions, 3, feature_rows, 4, 20)
    index = torch.full_like(drawn.others[0], -1)
    for found in Case(drawn.inputs, (index, drawn.others[1]), drawn.grad_out).run(sequence_assemble):
        assert (found == 0).all()


def test_an_index_beyond_the_last_row_counts_as_none(device: torch.device) -> None:
    """On a GPU the index is not read back; memory that is not the sources' may then not be read."""
    text, features, newline = (torch.ones(shape, device=device) for shape in ((2, 5), (3, 5), (5,)))
    index = torch.tensor([[5], [6], [2_000_000_000], [-7], [0]], dtype=torch.int32, device=device)
    found = forward(text, features, newline, index, None)
    assert torch.equal(found, sequence_assemble_reference(text, features, newline, index, None))
    assert found[:, 0].tolist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize("positions", [1, 127, 1000])
def test_a_newline_of_every_position(device: torch.device, positions: int) -> None:
    drawn = case(device, torch.float32, positions, 2, 2, 1, 40)
    everywhere = Case(drawn.inputs, (torch.full_like(drawn.others[0], 4), None), drawn.grad_out)
    assert_near_truth(everywhere, sequence_assemble, plain_assemble)


def test_a_prepared_schedule_and_wide_indices_change_nothing(device: torch.device) -> None:
    drawn = case(device, torch.bfloat16, 60, 20, 30, 4, 64)
    index, weight = drawn.others
    schedule = assemble_schedule(index, 51)
    for others in ((index, weight, schedule), (index.long(), weight), (index.long(), weight, schedule)):
        other = Case(drawn.inputs, others, drawn.grad_out)
        for found, expected in zip(other.run(sequence_assemble), drawn.run(sequence_assemble), strict=True):
            assert torch.equal(found, expected)


def test_slices_of_positions_add_up_to_the_whole(device: torch.device) -> None:
    """As sequence-parallel ranks have them: outputs one behind another, gradients summed."""
    drawn = case(device, torch.float32, 96, 40, 50, 4, 32)
    out, *gradients = drawn.run(sequence_assemble)
    parts = [
        Case(drawn.inputs, tuple(other[part] for other in drawn.others), drawn.grad_out[part]).run(sequence_assemble)
        for part in (slice(0, 32), slice(32, 64), slice(64, 96))
    ]
    assert torch.equal(torch.cat([part[0] for part in parts]), out)
    for number, gradient in enumerate(gradients, 1):
        torch.testing.assert_close(sum(part[number] for part in parts), gradient)


def test_same_bits_twice(device: torch.device) -> None:
    again = case(device, torch.bfloat16, 300, 20, 30, 4, 64)
    for first, second in zip(again.run(sequence_assemble), again.run(sequence_assemble), strict=True):
        assert torch.equal(first, second)
