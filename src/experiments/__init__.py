"""Command lines. They know every module and decide nothing."""
