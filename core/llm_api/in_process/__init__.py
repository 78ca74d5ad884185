"""vLLM in this process: how it is started, who shares it, and the thread that it runs in."""
