"""Data in, batches out, scores."""
