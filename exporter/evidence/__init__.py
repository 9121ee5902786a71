"""How close the result is to PyTorch, and the report that tells it."""
