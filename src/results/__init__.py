"""Runs' files: written, read back in any state, diagnosed, compared, shown and exported. Asks no model."""
