"""A question -> runs -> numbers -> a sentence."""
