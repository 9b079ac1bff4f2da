"""How the steps of a base with many adapters are computed."""
