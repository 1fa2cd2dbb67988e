"""The switch between Triton and reference, the package without Triton, and what the ops say about wrong arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from megavlm_kernels import (
    assemble_schedule,
    gated_residual,
    media_attention,
    media_schedule,
    resampler_attention,
    sequence_assemble,
    tile_pack,
    use,
)
from megavlm_kernels.dispatch import takes_triton


def test_auto_takes_the_reference_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAVLM_KERNELS", raising=False)
    assert not takes_triton(torch.ones(1))
    monkeypatch.setenv("MEGAVLM_KERNELS", "triton")
    assert takes_triton(torch.ones(1))
    with use("reference"):
        assert not takes_triton(torch.ones(1))
        with use("triton"):
            assert takes_triton(torch.ones(1))
        assert not takes_triton(torch.ones(1))
    assert takes_triton(torch.ones(1))


def test_tensors_without_data_take_the_reference() -> None:
    with use("triton"):
        assert not takes_triton(torch.ones(1, device="meta"))


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="use = 'cuda': no such kernel choice; use auto, triton, reference"),
        use("cuda"),
    ):
        pass
    monkeypatch.setenv("MEGAVLM_KERNELS", "fast")
    with pytest.raises(ValueError, match="MEGAVLM_KERNELS = 'fast'"):
        takes_triton(torch.ones(1))


def test_the_package_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, megavlm_kernels as mk\n"
        "x = torch.ones(2, 3, requires_grad=True)\n"
        "mk.gated_residual(x, x, torch.ones(1), torch.ones(2)).sum().backward()\n"
        "print(x.grad.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "torch.Size([2, 3])", done.stderr


def test_kernels_import_nothing_but_torch_and_triton() -> None:
    code = "import sys, megavlm_kernels; print('triton' in sys.modules, 'megatron' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False False"


Q, MEDIA, BOUNDS = torch.ones(2, 3, 1, 4), torch.ones(5, 1, 4), torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3, 4)}, "q.shape = (2, 3, 4): give it as [images, latents, heads, d]"),
        ({"q": torch.ones(2, 0, 1, 4)}, "q.shape = (2, 0, 1, 4): there has to be a latent"),
        ({"v_latents": torch.ones(2, 4, 1, 4)}, "v_latents.shape = (2, 4, 1, 4): it has to be that of q, (2, 3, 1, 4)"),
        ({"v_media": torch.ones(4, 1, 4)}, "v_media.shape = (4, 1, 4): it has to be (5, 1, 4)"),
        ({"cu_seqlens_media": BOUNDS[:2]}, "cu_seqlens_media.shape = (2,): it has to be (3,)"),
        ({"cu_seqlens_media": torch.tensor([0, 2, 4])}, "cu_seqlens_media = [0, 2, 4]: it has to rise from 0 to the 5"),
        ({"cu_seqlens_media": torch.tensor([0, 6, 5])}, "cu_seqlens_media = [0, 6, 5]: it has to rise from 0"),
        ({"q": torch.ones(2, 3, 1, 4, device="meta")}, "k_media.device = cpu: move it to meta"),
    ],
)
def test_wrong_arguments_of_the_resampler(change: dict[str, torch.Tensor], message: str) -> None:
    right = {"q": Q, "k_media": MEDIA, "v_media": MEDIA, "k_latents": Q, "v_latents": Q, "cu_seqlens_media": BOUNDS}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        resampler_attention(**{**right, **change}, scale=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, 3, 1, 8)}, "k.shape = (2, 3, 1, 8): it has to be [images, latents, 1, 4]"),
        ({"k": torch.ones(2, 0, 1, 4)}, "k.shape = (2, 0, 1, 4): there has to be a latent"),
        ({"v": torch.ones(1, 3, 1, 4)}, "v.shape = (1, 3, 1, 4): it has to be that of k"),
        ({"image_index": torch.zeros(4)}, "image_index.shape = (4,): it has to be (5,)"),
        ({"image_index": torch.tensor([0, 1, 2, 0, -1])}, "image_index = -1 to 2: use 0 to 1 for the 2 images, or -1"),
    ],
)
def test_wrong_arguments_of_media_attention(change: dict[str, torch.Tensor], message: str) -> None:
    right: dict[str, Any] = {"q": MEDIA, "k": Q, "v": Q, "image_index": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        media_attention(**{**right, **change}, scale=0.5)


def test_a_schedule_made_for_another_batch_is_refused() -> None:
    index = torch.zeros(5, dtype=torch.int64)
    for schedule, message in (
        (media_schedule(index, 3), r"schedule of \(tokens, images\) = \(5, 3\): make it for \(5, 2\)"),
        (media_schedule(index, 2, block=128), "schedule.block = 128: a kernel's tile holds at most 64 tokens"),
    ):
        with use("triton"), pytest.raises(ValueError, match=message):
            media_attention(MEDIA, Q, Q, index, 0.5, schedule)


def test_kernels_refuse_mixed_types() -> None:
    index = torch.zeros(5, dtype=torch.int64)
    with use("triton"), pytest.raises(ValueError, match="dtypes = q torch.float64, .*: cast all of them to one of"):
        media_attention(MEDIA.double(), Q, Q, index, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.ones(2, 4)}, "y.shape = (2, 4): it has to be that of x, (2, 3)"),
        ({"gate": torch.ones(3)}, "gate.shape = (3,): it has to be (1,)"),
        ({"flag": torch.ones(3)}, "flag.shape = (3,): it has to be (2,)"),
        ({"flag": torch.ones(2).long()}, "flag.dtype = torch.int64: use bool or the dtype of x, torch.float32"),
    ],
)
def test_wrong_arguments_of_gated_residual(change: dict[str, torch.Tensor], message: str) -> None:
    right = {"x": torch.ones(2, 3), "y": torch.ones(2, 3), "gate": torch.ones(1), "flag": torch.ones(2)}
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        gated_residual(**{**right, **change})


BYTES, TABLE = torch.zeros(2 * 36, dtype=torch.uint8), torch.tensor([[0, 3, 4, 0, 0], [36, 4, 3, -1, 7]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": BYTES.view(2, 36)}, "images.shape = (2, 36): flatten the pixels of all images to one dimension"),
        ({"images": BYTES.float()}, "images.dtype = torch.float32: use uint8"),
        ({"tiles": TABLE[:, :4]}, "tiles.shape = (2, 4): give [tiles, 5]"),
        ({"tiles": TABLE.int()}, "tiles.dtype = torch.int32: use int64"),
        ({"patch_size": 0}, "patch_size = 0: use 1 or more"),
        ({"patches_per_side": -1}, "patches_per_side = -1: use 1 or more"),
        ({"dtype": torch.float64}, "dtype = torch.float64: use bfloat16, float16 or float32"),
        ({"tiles": TABLE.to("meta")}, "tiles.device = meta: move it to cpu"),
        (
            {"tiles": TABLE + torch.tensor([1, 0, 0, 0, 0])},
            "tiles[1] = first byte 37, height 4, width 3, top -1, left 7: its image has to lie within the 72 bytes",
        ),
        ({"tiles": TABLE * torch.tensor([1, 0, 1, 1, 1])}, "tiles[0] = first byte 0, height 0, width 4, top 0, left 0"),
    ],
)
def test_wrong_arguments_of_tile_pack(change: dict[str, Any], message: str) -> None:
    right = {"images": BYTES, "tiles": TABLE, "patch_size": 2, "patches_per_side": 1}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        tile_pack(**{**right, **change}, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.ones(3)}, "text.shape = (3,): give it as [text rows, width]"),
        ({"features": torch.ones(3, 2)}, "features.shape = (3, 2): it has to be [patch rows, 4]"),
        ({"newline": torch.ones(1, 4)}, "newline.shape = (1, 4): it has to be (4,)"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, "index.shape = (5,): give it as [positions, columns]"),
        ({"index": torch.zeros(5, 2)}, "index.dtype = torch.float32: use int32 or int64"),
        ({"weight": torch.ones(5)}, "weight.shape = (5,): it has to be that of index, (5, 2)"),
        ({"weight": torch.ones(5, 2).half()}, "weight.dtype = torch.float16: use float32"),
        ({"features": torch.ones(3, 4, device="meta")}, "features.device = meta: move it to cpu"),
        (
            {"index": torch.tensor([[6, 0], [-1, 0]]), "weight": None},
            "index = -1 to 6: use 0 to 5 for the 2 rows of text, the 3 of features and the newline, or -1",
        ),
        ({"index": torch.full((5, 2), -2)}, "index = -2 to -2: use 0 to 5"),
    ],
)
def test_wrong_arguments_of_sequence_assemble(change: dict[str, Any], message: str) -> None:
    right = {"text": torch.ones(2, 4), "features": torch.ones(3, 4), "newline": torch.ones(4)}
    places = {"index": torch.zeros(5, 2, dtype=torch.int64), "weight": torch.ones(5, 2)}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        sequence_assemble(**{**right, **places, **change})


def test_an_assemble_schedule_made_for_another_batch_is_refused() -> None:
    text, index = torch.ones(2, 4), torch.zeros(5, 2, dtype=torch.int64)
    message = r"schedule of \(places, rows\) = \(10, 6\): make it for \(10, 5\)"
    with use("triton"), pytest.raises(ValueError, match=message):
        sequence_assemble(text, text, text[0], index, None, assemble_schedule(index, 6))
