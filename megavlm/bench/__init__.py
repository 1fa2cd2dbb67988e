"""Benchmarks of this machine: ours against theirs in alternation, each row with a check that both compute the same."""
