"""Draw the loss of a log of JSON lines (`--log-json`) in the terminal."""

from __future__ import annotations

import argparse

from megavlm.train.callbacks.json_lines import read_log
from megavlm.train.curve import loss_curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", help="the file that --log-json wrote")
    parser.add_argument("--loss", default="lm loss", help="which loss, such as 'lm loss/toy-chat'")
    arguments = parser.parse_args()
    steps = [entry["losses"] for entry in read_log(arguments.log) if entry["kind"] == "step"]
    print(loss_curve([losses[arguments.loss] for losses in steps if losses.get(arguments.loss) is not None]))


if __name__ == "__main__":
    main()
