"""Internal Coherence Maximization (Wen et al. 2025, arXiv 2506.10139): pure functions and small frozen types.

Nothing here opens a file or a socket: scores come in as numbers, questions go out as prompts.
"""
