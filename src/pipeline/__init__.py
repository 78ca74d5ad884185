"""Steps around a model: load, transform, query, evaluate; and ICM's own steps built from them."""
