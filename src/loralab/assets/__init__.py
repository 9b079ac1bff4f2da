"""Models and data that arrive as packages: each module registers its names; nothing imports them."""
