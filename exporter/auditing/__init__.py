"""What a compression changed: whom it fails, how sure it is, what it looks at, what it can stand."""
