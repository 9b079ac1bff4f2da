"""Find and load a base model."""
