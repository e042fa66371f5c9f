"""Measurements on a GPU, each a program: ``python -m gpu.attention``. `benchmarks/gpu.sh` runs them all."""
