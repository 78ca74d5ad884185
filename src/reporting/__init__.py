"""Pages and tables of finished and running searches. Knows the algorithm's values, no model, no network."""
