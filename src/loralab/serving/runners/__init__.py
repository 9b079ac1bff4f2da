"""Ways to compute the steps of a base with many adapters."""
