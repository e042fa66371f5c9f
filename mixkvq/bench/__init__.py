"""Benchmarks: what `mixkvq bench` measures, against rivals that take turns in the same run."""
