"""Scripts that keep the tree in step with itself."""
