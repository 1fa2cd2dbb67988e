"""A Hugging Face folder, loaded under a layout and written again.

The same as `megavlm export-hf`, which explains its options with --help.
"""

from __future__ import annotations

import sys

from megavlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["export-hf", *sys.argv[1:]]))
