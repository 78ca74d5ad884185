"""Steps around a model: pools from data files, searches, baselines."""
