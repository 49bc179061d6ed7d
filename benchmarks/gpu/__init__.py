"""Correctness and speed of every stage on one GPU: ``python -m benchmarks.gpu --out FILE``. README.md says more."""
