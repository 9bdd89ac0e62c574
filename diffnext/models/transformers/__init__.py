"""The trained networks."""
