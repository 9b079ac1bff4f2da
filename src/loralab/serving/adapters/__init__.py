"""Adapters of a store: names, files, and what is in memory."""
