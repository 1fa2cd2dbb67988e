"""The references of the ops, which the CPU trains with: against the slow truth, gradcheck, and shapes without data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_truth import plain_assemble, plain_gated, plain_media, plain_resampler, plain_tiles
from torch._subclasses.fake_tensor import FakeTensorMode

from megavlm_kernels import (
    assemble_schedule,
    gated_residual,
    media_attention,
    media_schedule,
    resampler_attention,
    sequence_assemble,
    tile_pack,
)
from megavlm_kernels.tiles.reference import tile_pack_reference

Op = Callable[..., torch.Tensor]
RESAMPLER: Op = resampler_attention
MEDIA: Op = media_attention
GATED: Op = gated_residual
ASSEMBLE: Op = sequence_assemble


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(op: Op, plain: Op, inputs: list[torch.Tensor], *others: object) -> None:
    """Output and gradients of the op agree with the plain formula's."""
    out, expected = op(*inputs, *others), plain(*inputs, *others)
    grad_out = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for found, right in zip(
        torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out), strict=True
    ):
        torch.testing.assert_close(found, right)


def resampler_inputs(
    lengths: list[int], latents: int, heads: int, width: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    own, media = (len(lengths), latents, heads, width), (sum(lengths), heads, width)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return [draw(*own), draw(*media), draw(*media), draw(*own), draw(*own)], bounds


@pytest.mark.parametrize("lengths", [[9, 9, 9], [4, 0, 17], [1], [0, 0]], ids=str)
def test_resampler_is_the_plain_formula(lengths: list[int]) -> None:
    inputs, bounds = resampler_inputs(lengths, 5, 2, 8)
    assert_same(RESAMPLER, plain_resampler, inputs, bounds, 0.3)


@pytest.mark.parametrize(("tokens", "images"), [(50, 3), (200, 1), (7, 9), (1, 1), (300, 2)])
def test_media_is_the_plain_formula(tokens: int, images: int) -> None:
    index = torch.randint(-1, images, (tokens,))
    assert_same(MEDIA, plain_media, [draw(tokens, 2, 8), draw(images, 3, 2, 8), draw(images, 3, 2, 8)], index, 0.3)


@pytest.mark.parametrize(("tokens", "images"), [(6, 0), (0, 2), (0, 0), (6, 2)])
def test_media_with_nothing_attended_is_zero_and_stays_in_the_graph(tokens: int, images: int) -> None:
    """A rank without images still takes part in the backward: every input gets a gradient, not None."""
    inputs = [draw(tokens, 2, 8), draw(images, 3, 2, 8), draw(images, 3, 2, 8)]
    out = MEDIA(*inputs, torch.full((tokens,), -1), 0.3)
    for found in (out, *torch.autograd.grad(out, inputs, torch.randn_like(out))):
        assert (found == 0).all()


@pytest.mark.parametrize("flag", [torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 1.0]).double()], ids=str)
def test_gated_is_the_plain_formula(flag: torch.Tensor) -> None:
    assert_same(GATED, plain_gated, [draw(3, 7), draw(3, 7), draw(1)], flag)


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize(("text_rows", "feature_rows"), [(7, 9), (0, 5), (5, 0), (0, 0)])
def test_assemble_is_the_plain_formula(text_rows: int, feature_rows: int, columns: int) -> None:
    index = torch.randint(-1, text_rows + feature_rows + 1, (40, columns))
    weight = None if columns == 1 else torch.rand(40, columns)
    assert_same(ASSEMBLE, plain_assemble, [draw(text_rows, 6), draw(feature_rows, 6), draw(6)], index, weight)


def test_an_index_beyond_the_last_row_counts_as_none_where_it_cannot_be_refused() -> None:
    """On a GPU the index is not read back; the backward may then not give its gradient to another row."""
    schedule = assemble_schedule(torch.tensor([[0, 7], [-3, 2], [3, 0]]), 3)
    uses = [schedule.order[begin:end].tolist() for begin, end in schedule.starts.unfold(0, 2, 1).tolist()]
    assert uses == [[0, 5], [], [3]]


TILES = [[0, 10, 20, -3, 15], [0, 10, 20, 2, 3], [600, 3, 4, -1, -2], [600, 3, 4, 9, 0], [600, 3, 4, -90, -90]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pack", [tile_pack, tile_pack_reference], ids=["as the CPU does", "reference"])
def test_tiles_are_the_plain_formula(pack: Op, dtype: torch.dtype) -> None:
    images, table = torch.randint(0, 256, (600 + 36,), dtype=torch.uint8), torch.tensor(TILES)
    mean, std, border = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), (9, 8.5, 7)
    settings = {"patch_size": 3, "patches_per_side": 2, "mean": mean, "std": std, "border": border, "dtype": dtype}
    found = pack(images, table, **settings)
    assert torch.equal(found, plain_tiles(images, table, 3, 2, mean, std, border).to(dtype))
    spread_images, spread_table = torch.stack([images, images + 1], 1)[:, 0], torch.stack([table, -table], 2)[..., 0]
    assert torch.equal(pack(spread_images, spread_table, **settings), found)


def test_gradcheck() -> None:
    inputs, bounds = resampler_inputs([3, 1], 2, 2, 4)
    assert torch.autograd.gradcheck(lambda *given: RESAMPLER(*given, bounds, 0.5), inputs)
    index = torch.tensor([1, -1, 0, 1, -1])
    of_media = [draw(5, 2, 4), draw(2, 3, 2, 4), draw(2, 3, 2, 4)]
    assert torch.autograd.gradcheck(lambda *given: MEDIA(*given, index, 0.5), of_media)
    flag = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda *given: GATED(*given, flag), [draw(2, 3), draw(2, 3), draw(1)])
    places, weight = torch.tensor([[0, 2], [4, -1], [1, 4], [3, 3]]), torch.rand(4, 2)
    of_rows = [draw(2, 3), draw(2, 3), draw(3)]
    assert torch.autograd.gradcheck(lambda *given: ASSEMBLE(*given, places, weight), of_rows)


def test_ops_run_on_shapes_alone() -> None:
    """As the planner traces them: no value may be read on the way."""
    with FakeTensorMode():
        inputs, bounds = resampler_inputs([9, 9], 4, 2, 8)
        (grad_q, *_) = torch.autograd.grad(RESAMPLER(*inputs, bounds, 0.3).sum(), inputs)
        of_media = [draw(30, 2, 8), draw(3, 4, 2, 8), draw(3, 4, 2, 8)]
        out = MEDIA(*of_media, torch.zeros(30, dtype=torch.int32), 0.3)
        (_, grad_k, _) = torch.autograd.grad(out.sum(), of_media)
        of_rows, index = [draw(5, 8), draw(6, 8), draw(8)], torch.zeros(9, 4, dtype=torch.int32)
        (*_, grad_newline) = torch.autograd.grad(ASSEMBLE(*of_rows, index, torch.ones(9, 4)).sum(), of_rows)
        images, table = torch.zeros(90, dtype=torch.uint8), torch.zeros(2, 5, dtype=torch.int64)
        packed = tile_pack(images, table, patch_size=3, patches_per_side=2, mean=(0, 0, 0), std=(1, 1, 1))
    assert grad_q.shape == (2, 4, 2, 8) and grad_k.shape == (3, 4, 2, 8)
    assert grad_newline.shape == (8,) and packed.shape == (8, 27)


def boundaries(index: torch.Tensor) -> int:
    return int((index[1:] != index[:-1]).sum())


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize(("tokens", "images"), [(384, 6), (100, 3), (63, 9), (1, 1), (5, 0), (0, 3)])
def test_each_token_is_in_one_tile_of_its_own_image(tokens: int, images: int, block: int) -> None:
    for index in (torch.randint(-1, images, (tokens,)), torch.randint(-1, images, (tokens,)).sort().values):
        schedule = media_schedule(index, images, block)
        seen = []
        for image, begin, end in zip(schedule.tile_image, schedule.tile_begin, schedule.tile_end, strict=True):
            members = schedule.order[begin:end]
            assert len(members) <= block
            assert (index[members] == image).all()
            seen += members.tolist()
        assert sorted(seen) == list(range(tokens))


@pytest.mark.parametrize("block", [1, 16, 64])
def test_no_more_tiles_are_visited_than_tokens_and_boundaries_ask_for(block: int) -> None:
    for _ in range(20):
        lengths = torch.randint(1, 90, (7,))
        index = torch.tensor([0, -1, 1, 2, -1, 3, 5]).repeat_interleave(lengths)
        visits = media_schedule(index, 6, block).visits()
        with_image = index[index >= 0]
        assert with_image.shape[0] / block <= visits <= -(-index.shape[0] // block) + boundaries(index)


def test_an_image_beyond_the_last_counts_as_none_where_it_cannot_be_refused() -> None:
    """On a GPU the index is not read back; no token may then be left out of every tile, or read past the end."""
    schedule = media_schedule(torch.tensor([0, 7, -3, 1]), 2, 4)
    tiles = zip(schedule.tile_image.tolist(), schedule.tile_begin.tolist(), schedule.tile_end.tolist(), strict=True)
    assert [(image, schedule.order[begin:end].tolist()) for image, begin, end in tiles if end > begin] == [
        (-1, [1, 2]),
        (0, [0]),
        (1, [3]),
    ]
