#!/usr/bin/env bash
""":"
# InfiMM, second stage: resampler and gated blocks learn from question-answering data sets.
#
#   bash examples/multitask_infimm.sh --tiny                         # behind pretrain_infimm.sh --tiny
#   bash examples/multitask_infimm.sh --model vicuna-13b --data-path data
#   torchrun --nproc-per-node 8 examples/multitask_infimm.sh --pretrained-checkpoint DIR --tokenizer DIR --data-path data
#
# It starts from what pretrain_infimm.sh has saved in runs/MODEL/pretrain, or from --pretrained-checkpoint or --load-hf.
# --model is llama2-13b (by default), vicuna-13b or zephyr-7b; every other option is one of
# `megavlm train infimm-llama2-13b/multitask`. It saves in runs/MODEL/multitask; given again it goes on from there.
#
# Bash becomes torchrun here (launch.sh says what it takes from the environment), which runs this file as Python.
source "$(dirname "$0")/launch.sh"
: <<'# the end'
"""

import sys

from megavlm.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("infimm", "multitask", sys.argv[1:]))
# the end
