"""Metrics for Prometheus: of vLLM servers, of the client, of a run. Needs the extra `metrics`."""
