"""`megavlm doctor`: what is installed, what is missing, what is wrong, what this machine can run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from megavlm.platform.doctor.checks import Finding, can_train, examine, what_runs
from megavlm.platform.doctor.facts import gather_facts

COLOURS = {"ok": "32", "note": "36", "warning": "33", "problem": "31"}


def main(arguments: Sequence[str]) -> int:
    """Print the report; exit code 1 when training here would fail."""
    parser = argparse.ArgumentParser(prog="megavlm doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    facts = gather_facts()
    findings = examine(facts)
    is_able = can_train(findings)
    conclusion = what_runs(facts, is_able)
    if options.json:
        listed = {heading: [asdict(finding) for finding in group] for heading, group in findings.items()}
        print(json.dumps({"can_train": is_able, "runs": conclusion, "findings": listed}, indent=2))
    else:
        print(table(findings, is_coloured=sys.stdout.isatty()))
        print(f"\nThis machine runs: {conclusion}")
    return 0 if is_able else 1


def table(findings: dict[str, list[Finding]], *, is_coloured: bool) -> str:
    """The findings under their headings, each remedy in the line below."""
    width = max(len(finding.name) for group in findings.values() for finding in group)
    lines = []
    for heading, group in findings.items():
        lines += ["", heading]
        for finding in group:
            status = f"{finding.status:<7}"
            if is_coloured:
                status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
            lines.append(f"  {status}  {finding.name:<{width}}  {finding.found}")
            if finding.remedy:
                lines.append(f"  {'':7}  {'':{width}}  -> {finding.remedy}")
    return "\n".join(lines[1:])
