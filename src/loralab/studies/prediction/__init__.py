"""The best learning rate and the smallest sufficient rank, predicted from a few gradients and recorded sweeps."""
