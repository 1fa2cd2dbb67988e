"""Every byte of a checkpoint checked once a job, the files dealt over the ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megavlm.checkpoint.sealed import check_file, read_seal, read_sums
from megavlm.log import get_logger
from megavlm.parallel.agree import agreed
from megavlm.parallel.vision_parallel import deal_images

logger = get_logger(__name__)


def verify_folders(sealed: Sequence[Path], summed: Sequence[Path], rank: int, ranks: int, device: torch.device) -> None:
    """Refuse folders that are not what was written: by their lists first, then by their bytes.

    `sealed` have a manifest, `summed` a list of sums. All ranks call it, and all leave it with the same error.
    """
    with agreed():
        files = [(folder / name, entry) for folder in sealed for name, entry in read_seal(folder).items()]
        files += [(folder / name, entry) for folder in summed for name, entry in read_sums(folder).items()]
        sizes = [float(path.stat().st_size) for path, _ in files]
    began, checked = time.perf_counter(), 0
    with agreed():
        for number in deal_images(sizes, ranks)[rank]:
            checked += check_file(*files[number])
    took = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
    if ranks > 1:
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
    total, seconds = sum(sizes) / 1e9, max(took.item(), 1e-9)
    logger.info("checked %d files, %.3f GB in %.2f s (%.2f GB/s)", len(files), total, seconds, total / seconds)
