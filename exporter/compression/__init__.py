"""Smaller networks: channels pruned, low rank, sparsity, separable convolutions, and the training after them."""
