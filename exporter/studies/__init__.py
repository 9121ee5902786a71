"""Many exports: sweeps, comparisons, the whole zoo, the training of the packaged network."""
