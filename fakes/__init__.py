"""Servers that behave like real ones, in the same process, for tests and for benchmarks without a model."""
