"""The quick path of a training step, and the check that it changes nothing."""
