"""Steps around a model: pools from data files, searches, baselines, and the files of a run."""
