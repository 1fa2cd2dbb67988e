"""The fused parts that a machine with GPUs takes: a model is built with each choice, and float32 stays float32."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from megavlm.build.model import build_model
from megavlm.build.run_config import PrecisionConfig, RunConfig
from megavlm.data.toy_text import toy_step
from megavlm.errors import UnavailableError
from megavlm.parallel import groups as process_groups
from megavlm.parallel.schedule import forward_backward
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.platform import machine
from megavlm.recipes import recipe
from megavlm.testing import spawn

NEEDS_ENGINE = {"apply_rope_fusion": False}
"""Refused by megatron-core here, where Transformer Engine is not."""


def fields_on_gpus(engine: bool, dtype: torch.dtype) -> dict[str, bool | str]:
    with mock.patch("torch.cuda.is_available", return_value=True):
        return machine.fused_parts(engine, dtype) | NEEDS_ENGINE


def gradients(run: RunConfig, fields: dict[str, bool | str]) -> dict[str, Tensor]:
    groups = process_groups.start(run.parallel, seed=5)
    with mock.patch.object(machine, "fused_parts", return_value=fields):
        chunks = wrap_data_parallel(list(build_model(run, groups).chunks), run.data_parallel)
    shape = {"global_batch_size": 2, "micro_batch_size": 2, "seq_length": 16, "vocab_size": run.decoder.vocab_size}
    forward_backward(chunks, toy_step(seed=1, step=0, data_rank=0, data_size=1, **shape), groups)
    process_groups.stop()
    return {name: parameter.main_grad.clone() for chunk in chunks for name, parameter in chunk.named_parameters()}


def build_with_each(engine: bool) -> None:
    process_groups.join()
    for dtype in ("float32", "bfloat16"):
        run = recipe("decoder-tiny").replace(precision=PrecisionConfig(params_dtype=dtype))
        fields = fields_on_gpus(engine, run.precision.dtype)
        assert fields["cross_entropy_loss_fusion"] == (dtype == "bfloat16")
        found, plain = gradients(run, fields), gradients(run, machine.fused_parts(False, run.precision.dtype))
        for name, gradient in plain.items():
            off = (found[name] - gradient).norm() / gradient.norm()
            assert off < (1e-6 if dtype == "float32" else 2e-2), (dtype, name, float(off))


@pytest.mark.parametrize("engine", [False, True])
def test_models_are_built_with_what_gpus_have_and_keep_their_gradients(engine: bool) -> None:
    spawn(build_with_each, 1, engine)


@pytest.mark.parametrize(("found", "is_fine"), [("2.10.0", False), ("2.11.0+cu13", True), ("3.0", True)])
def test_a_transformer_engine_that_is_too_old_is_refused(found: str, is_fine: bool) -> None:
    with mock.patch.object(machine, "version", return_value=found):
        if is_fine:
            machine.check_transformer_engine()
            return
        with pytest.raises(UnavailableError, match=r"'2\.10\.0': is too old.*--transformer-impl local"):
            machine.check_transformer_engine()
