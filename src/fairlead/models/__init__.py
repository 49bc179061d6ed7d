"""Weights, roles, adapters, heads and attention. Knows nothing of data sets."""
