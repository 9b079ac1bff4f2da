"""Many adapters, one base, one batch."""
