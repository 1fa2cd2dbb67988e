"""A run for the model that a checkpoint holds: what `generate --load` and its like build."""

from __future__ import annotations

from pathlib import Path

from megavlm.build.run_config import CheckpointConfig, ParallelConfig, RecomputeConfig, RunConfig, WeightsConfig
from megavlm.checkpoint import shelf
from megavlm.checkpoint.pretrained import find_checkpoint
from megavlm.errors import CheckpointError, MegavlmError


def run_from_checkpoint(path: str | Path) -> tuple[RunConfig, str | None]:
    """The run that saved the checkpoint, now to start from its weights, in one process, saving nothing; and the folder
    of its tokenizer."""
    folder = find_checkpoint(path, "--load")
    file = folder / shelf.RUN_FILE
    if not file.is_file():
        problem = f"holds no {shelf.RUN_FILE}, so it is no checkpoint of ours"
        raise CheckpointError("--load", str(folder), problem, "name a folder that --save has filled")
    try:
        saved = RunConfig.from_dict(shelf.read_run(folder).get("run") or {})
    except MegavlmError as error:
        raise CheckpointError(f"{file}: {error.where}", error.value, error.problem, error.remedy) from error
    run = saved.replace(
        parallel=ParallelConfig(),
        recompute=RecomputeConfig(),
        transformer_impl="auto",
        # Weights are the same in any format, and FP8 takes no row of a single token, nor every machine.
        precision=saved.precision.replace(fp8_format="none"),
        checkpoint=CheckpointConfig(),
        weights=WeightsConfig(pretrained_checkpoint=str(folder)),
    )
    return run, saved.tokenizer_folder
