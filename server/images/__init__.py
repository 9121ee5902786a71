"""Image bytes to rows of an input."""
