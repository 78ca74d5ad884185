"""What is installed beside somebody's vLLM: a plugin and a route that make pools cheap, and scores exact.

A server loads it (plugin.py, label_logprobs.py); the client shares the format in which pools travel (prompt_tree.py).
It needs nothing but vLLM, and no other package of this project.
"""
