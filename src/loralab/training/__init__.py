"""Adapter + task -> trained adapter."""
