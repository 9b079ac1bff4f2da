"""Artefacts: merged models and exported adapters, each with its certificate."""
