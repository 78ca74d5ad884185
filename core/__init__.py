"""Talking to language models: engines, routing, caching, settings. Knows nothing of any experiment."""
