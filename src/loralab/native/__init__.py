"""What is compiled for the machine at hand, and optional everywhere."""
