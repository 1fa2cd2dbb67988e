"""The folder `kernels` runs Triton: on a GPU, or with TRITON_INTERPRET=1 set before triton is imported.

So it has a process of its own (test_interpreter.py). To run one of its tests by hand:
TRITON_INTERPRET=1 pytest tests/ops/kernels/test_media.py
"""

from __future__ import annotations

import os

import torch

is_runnable = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
collect_ignore = [] if is_runnable else ["kernels"]
