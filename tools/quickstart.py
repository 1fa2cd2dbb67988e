"""Train a toy decoder on two processes, export it, load the export with transformers and let it count on.

    make quickstart

Hardware: two CPU cores. Time: one to two minutes. Expected: `lm loss` falls below 1, and most continuations are right.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megavlm.data.toy_text import STRIDES

FOLDER = Path("runs/quickstart")
VOCABULARY = 100


def main() -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    launch = ["torchrun", "--nproc-per-node", "2", "-m", "megavlm", "train", "decoder-tiny"]
    options = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--export-hf", str(FOLDER / "hf")]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([*launch, *options], check=True, env=environment)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "hf")
    right = sum(show_continuation(model, stride) for stride in range(1, STRIDES + 1))
    print(f"{right} of {STRIDES} continuations are right; the model is in {FOLDER / 'hf'}")
    return 0


def show_continuation(model: torch.nn.Module, stride: int) -> bool:
    """Let the model go on counting by `stride` for four tokens; print them and say whether they are right."""
    counted = [(7 + stride * i) % VOCABULARY for i in range(1, 13)]
    prompt, expected = [stride, *counted[:8]], counted[8:]
    with torch.no_grad():
        answer = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    found = answer[0, len(prompt) :].tolist()
    print(f"count by {stride}: {prompt[1:]} -> {found} {'right' if found == expected else f'expected {expected}'}")
    return found == expected


if __name__ == "__main__":
    sys.exit(main())
