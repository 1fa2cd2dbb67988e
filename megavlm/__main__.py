"""`python -m megavlm`: the same as the console script, as torchrun's `-m megavlm` needs it."""

from __future__ import annotations

import sys

from megavlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
