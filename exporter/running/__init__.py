"""The two sides of every comparison, PyTorch and the runtimes, and the images that they run on."""
