"""Make the toy bases again: small towers that see the toy world and a small decoder that speaks of it.

    .venv/bin/python tools/make_toy_bases.py [eva] [siglip] [decoder] [projector] [--out FOLDER] [--shorter N]

Hardware: two CPU cores. Time: an hour for all.
Expected: what `megavlm/toy/bases/manifest.json` says under accuracy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megavlm.log import setup_logging
from megavlm.toy.bases import WEIGHTS
from megavlm.toy.make import BASES, make_bases


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the toy bases again.")
    parser.add_argument("which", nargs="*", metavar="BASE", help=f"some of {', '.join(BASES)}; none: all")
    parser.add_argument("--out", type=Path, default=Path(str(WEIGHTS)), help="folder for the weights and the manifest")
    parser.add_argument("--shorter", type=int, default=1, help="divide samples and steps by this, for a quick look")
    arguments = parser.parse_args()
    if unknown := set(arguments.which) - set(BASES):
        parser.error(f"no base is called {', '.join(sorted(unknown))}: there are {', '.join(BASES)}")
    setup_logging(rank=0, world_size=1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_bases(arguments.out, shorter=arguments.shorter, which=arguments.which or BASES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
