"""Published claims, registered before their runs and decided by them."""
