"""The page that a browser shows: its files, and examples to begin with."""
