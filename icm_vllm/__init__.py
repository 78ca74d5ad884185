"""Installed beside vLLM: a plugin and a route that make pools cheap, and scores exact.

A server loads them (plugin.py, label_logprobs.py); a client shares the format of pools (prompt_tree.py). Needs nothing
but vLLM, and no other package of this project.
"""
