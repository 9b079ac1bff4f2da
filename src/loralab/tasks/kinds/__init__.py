"""Kinds of models: how each one learns from rows, and how it is scored."""
