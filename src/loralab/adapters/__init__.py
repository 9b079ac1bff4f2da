"""Adapter methods: their modules, their files, and how they are put into a model."""
