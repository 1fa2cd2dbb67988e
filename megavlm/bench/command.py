"""The subcommand `megavlm bench`, a thin function."""

from __future__ import annotations

from megavlm.errors import ConfigError
from megavlm.options import take_options

HELP = ("-h", "--help")
USAGE = """usage: megavlm bench [--only NAME ...] [--quick] [--out FILE] [--list]

Measure this machine, CPU or GPU, and print one table: ours against theirs in alternation, ratios with their spread. A
row exists only where both sides computed the same; what a machine lacks is said and left out. Nothing is downloaded;
what is written goes to a temporary folder ($TMPDIR says where) and is removed.

  --only NAME   this one alone; may be repeated
  --quick       toy sizes: shows that everything runs, measures nothing
  --out FILE    append the rows, with machine, versions and commit, to this JSON file; without it, and without --quick,
                a checkout keeps them in docs/benchmarks, in a file by machine and day
  --list        the benchmarks, one line each"""


def bench(arguments: list[str]) -> int:
    """`megavlm bench`: the benchmarks of this machine."""
    if any(word in HELP for word in arguments):
        print(USAGE)
        return 0
    names, rest = _taken(arguments, "--only")
    own, rest = take_options(rest, [], ["--out"], flags=["--quick", "--list"])
    if rest:
        raise ConfigError("the command line", rest[0], "is no option of bench", "`megavlm bench --help` lists them")
    # Here, not above: help and mistakes need none of the packages that are measured.
    from megavlm.bench.report import kept_place
    from megavlm.bench.run import listing, run

    if "--list" in own:
        print(listing())
        return 0
    quick = "--quick" in own
    return run(names, quick, own.get("--out"), None if quick else kept_place())


def _taken(arguments: list[str], option: str) -> tuple[list[str], list[str]]:
    """All values of an option that may be repeated, each perhaps several words, and what is left."""
    found: list[str] = []
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name != option:
            rest.append(word)
        elif equals:
            found.append(value)
        elif not words or words[0].startswith("--"):
            raise ConfigError(option, None, "has no value", "write one behind it")
        else:
            while words and not words[0].startswith("--"):
                found.append(words.pop(0))
    return found, rest
