"""A released folder, or a decoder and a tower, as a folder that a run can start from.

The same as `megavlm import-hf`, which explains its options with --help.
"""

from __future__ import annotations

import sys

from megavlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["import-hf", *sys.argv[1:]]))
