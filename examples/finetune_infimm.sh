#!/usr/bin/env bash
""":"
# InfiMM, third stage: instruction finetuning, for LLaMA2 of the decoder, too.
#
#   bash examples/finetune_infimm.sh --tiny                          # behind multitask_infimm.sh --tiny
#   bash examples/finetune_infimm.sh --model vicuna-13b --data-path data --export-hf infimm-vicuna-chat
#   torchrun --nproc-per-node 8 examples/finetune_infimm.sh --pretrained-checkpoint DIR --tokenizer DIR --data-path data
#
# It starts from what multitask_infimm.sh has saved in runs/MODEL/multitask, or from --pretrained-checkpoint or
# --load-hf. --model is llama2-13b (by default), vicuna-13b or zephyr-7b; every other option is one of
# `megavlm train infimm-llama2-13b/finetune`. It saves in runs/MODEL/finetune; given again it goes on from there.
#
# Bash becomes torchrun here (launch.sh says what it takes from the environment), which runs this file as Python.
source "$(dirname "$0")/launch.sh"
: <<'# the end'
"""

import sys

from megavlm.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("infimm", "finetune", sys.argv[1:]))
# the end
