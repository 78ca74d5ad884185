"""Checkpoints with random weights of the shapes of published models (benchmarks/make_shape.py)."""
