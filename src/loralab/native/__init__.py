"""Kernels that are compiled for this machine; optional everywhere."""
