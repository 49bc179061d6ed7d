"""Records, templates, token rows and batches. Knows nothing of models."""
