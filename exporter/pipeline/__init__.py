"""One export, from a name to a published model."""
