"""Measure this machine and print one table: `make bench`."""

from __future__ import annotations

import argparse

from megavlm.bench.run import BENCHMARKS, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="measure this one (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that everything runs, measures nothing")
    parser.add_argument("--out", metavar="FILE", help="append the rows to this JSON file as well")
    arguments = parser.parse_args()
    return run(arguments.only or (), quick=arguments.quick, out=arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
