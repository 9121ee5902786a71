"""The gRPC ports, and the processes that front ends run in."""
