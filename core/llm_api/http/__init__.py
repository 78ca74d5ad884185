"""HTTP to one server: bounded requests, retries, rates, and what a vLLM server is asked beside scores."""
