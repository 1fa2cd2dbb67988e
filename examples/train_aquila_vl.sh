#!/usr/bin/env bash
""":"
# Aquila-VL-2B, all six stages as one run: 1, 2a, 2b, 2c, 3, 4, each from the weights of the one before.
#
#   bash examples/train_aquila_vl.sh --tiny                          # on a laptop: a toy model on a toy world
#   bash examples/train_aquila_vl.sh --load-hf aquila-vl --data-path data --export-hf exports
#   torchrun --nproc-per-node 8 examples/train_aquila_vl.sh --load-hf aquila-vl --data-path data --stages 1,2a
#
# --load-hf is what `megavlm import-hf` makes of a Qwen2.5 and a SigLIP. Every other option is one of
# `megavlm train aquila-vl-2b`; 4:--lr=5e-6 is for one stage. It saves in runs/aquila-vl-2b/STAGE; given again it
# skips what is finished and goes on with the rest.
#
# Bash becomes torchrun here (launch.sh says what it takes from the environment), which runs this file as Python.
source "$(dirname "$0")/launch.sh"
: <<'# the end'
"""

import sys

from megavlm.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("aquila-vl", None, sys.argv[1:]))
# the end
