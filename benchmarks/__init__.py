"""Measurements: what a pool scoring costs, and what the search finds. Each is a command of its own."""
