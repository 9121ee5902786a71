"""HTTP/2 for gRPC: bytes to messages of calls and back."""
