"""What learns in each published recipe at full size, counted without memory, against the papers' parameter counts."""

from __future__ import annotations

import pytest
from fake_world import join_fake_world
from torch._subclasses.fake_tensor import FakeTensorMode

from megavlm.build.model import build_model
from megavlm.build.run_config import ParallelConfig
from megavlm.model.freeze import count_parts
from megavlm.parallel import groups as process_groups
from megavlm.recipes import recipe
from megavlm.testing import spawn

LATENTS = {"zephyr": 63_019_008, "vicuna": 176_343_552, "llama": 112_603_392}
GATED = {"zephyr": 16 * 139_476_994, "vicuna": 10 * 216_813_570, "llama": 10 * 216_420_354}
WIDTH = {"zephyr": 4096, "vicuna": 5120, "llama": 5120}
DECODER_13B, AQUILA, PROJECTOR, UNUSED_NORM = 13_015_884_800, 1_945_595_424, 4_131_840, 2 * 1152


def learning(names: list[str]) -> dict[str, int]:
    """Recipe -> trained parameters, the vocabulary without padding."""
    join_fake_world(1)
    found = {}
    for name in names:
        run = recipe(name).replace(parallel=ParallelConfig(), make_vocab_size_divisible_by=2)
        groups = process_groups.start(run.parallel)
        with FakeTensorMode():
            found[name] = sum(count.trained for count in count_parts(build_model(run, groups).parts()))
        process_groups.stop()
    return found


@pytest.mark.parametrize("model", ["zephyr-7b", "vicuna-13b", "llama2-13b"])
def test_infimm_trains_as_many_parameters_as_published(model: str) -> None:
    kind = model.rstrip("-0123456789b")
    connector = LATENTS[kind] + GATED[kind]
    expected = {
        "pretrain": connector + 4 * WIDTH[kind],  # two rows of the embedding and of the output layer
        "multitask": connector,
        "finetune": connector + (DECODER_13B if kind == "llama" else 0),
        "finetune-card": connector + (DECODER_13B if kind == "llama" else 0),
    }
    names = {f"infimm-{model}/{stage}": count for stage, count in expected.items()}
    assert spawn(learning, 1, list(names)) == [names]


def test_aquila_vl_trains_the_projector_then_everything() -> None:
    """The 4.13M and 1.9B of the paper's table; the tower's last norm is used by nothing."""
    names = {"aquila-vl-2b/1": PROJECTOR}
    names |= {f"aquila-vl-2b/{stage}": AQUILA - UNUSED_NORM for stage in ("2a", "2b", "2c", "3", "4")}
    assert spawn(learning, 1, list(names)) == [names]
