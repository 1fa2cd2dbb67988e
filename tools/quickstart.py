"""Train a toy InfiMM through its three stages on two processes, load the export with transformers, and ask it.

    make quickstart                     # or: .venv/bin/python tools/quickstart.py [--seed N]
    make quickstart FAMILY=aquila-vl    # a toy Aquila-VL through its six

Towers and decoders are frozen at first, so it starts from toy bases that see and speak (`tools/make_toy_bases.py`).
Hardware: two CPU cores. Time and expected answers: docs/quickstart.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from megavlm.log import quiet_third_parties, setup_logging
from megavlm.toy.bases import FAMILY_BASES
from megavlm.toy.course import run_course
from megavlm.toy.show import curve, picture_sheet, score_table, some_of_each


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a toy model from end to end and ask it.")
    parser.add_argument("--family", choices=list(FAMILY_BASES), default="infimm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder, emptied first")
    parser.add_argument("--questions", type=int, default=100, help="of each kind, on either sort of unseen pictures")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_third_parties()
    setup_logging(rank=0, world_size=1)
    shutil.rmtree(arguments.out, ignore_errors=True)
    course = run_course(arguments.out, arguments.seed, family=arguments.family, questions=arguments.questions)
    picture_sheet(some_of_each(course.asked, 16), arguments.out / "answers.png")
    print("", curve(course.losses), "", score_table(course.scores), "", sep="\n")
    print("; ".join(f"{name} {seconds:.0f} s" for name, seconds in course.seconds.items()))
    print(f"the model is in {course.trained}, its answers are in {arguments.out / 'answers.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
