"""What leaves the laboratory, with its proof."""
