"""Records of a question -> findings, tables, sentences."""
