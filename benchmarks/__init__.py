"""Measured goals of the project: `python -m benchmarks [NAME…]` prints one JSON line for each benchmark."""
