"""The HTTP side: bytes to RPCs and back."""
