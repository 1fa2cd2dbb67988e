#!/usr/bin/env bash
""":"
# InfiMM, first stage: resampler, gated blocks and the two new tokens learn from captions and documents.
#
#   bash examples/pretrain_infimm.sh --tiny                          # on a laptop: a toy model on a toy world
#   bash examples/pretrain_infimm.sh --load-hf infimm-vicuna --model vicuna-13b --data-path data
#   torchrun --nproc-per-node 8 examples/pretrain_infimm.sh --load-hf infimm-llama2 --data-path data
#
# --model is llama2-13b (by default), vicuna-13b or zephyr-7b; --load-hf is what `megavlm import-hf` makes of a decoder
# and a tower. Every other option is one of `megavlm train infimm-llama2-13b/pretrain`. It saves in runs/MODEL/pretrain;
# given again it goes on from there.
#
# Bash becomes torchrun here (launch.sh says what it takes from the environment), which runs this file as Python.
source "$(dirname "$0")/launch.sh"
: <<'# the end'
"""

import sys

from megavlm.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("infimm", "pretrain", sys.argv[1:]))
# the end
