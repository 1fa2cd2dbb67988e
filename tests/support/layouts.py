"""Every layout that four processes allow, for `make test-full`; `make test` takes a written-out selection."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

MOST_PROCESSES = 4


def every_layout() -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name, processes, degrees): tensor, pipeline, virtual, data and sequence parallelism in all combinations."""
    for tensor, pipeline, virtual, data, sequence in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2), (0, 1)):
        processes = tensor * pipeline * data
        if processes > MOST_PROCESSES or (virtual > 1 and pipeline == 1) or (sequence and tensor == 1):
            continue
        if pipeline * virtual > MOST_PROCESSES:  # the models here have four layers
            continue
        name = f"TP={tensor} PP={pipeline} chunks={virtual} DP={data}{' SP' * sequence}"
        degrees = {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "virtual_pipeline_model_parallel_size": virtual,
            "sequence_parallel": bool(sequence),
        }
        yield name, processes, degrees
