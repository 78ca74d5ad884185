"""Measurements: what scoring a pool costs, and what the search finds. Each file is a command."""
