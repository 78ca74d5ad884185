"""Is a score a function of its prompt alone? Asks an engine the same prompts in many ways and compares bit by bit."""
