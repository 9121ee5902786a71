"""Images: read, resized, normalized, made."""
