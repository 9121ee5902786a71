"""What each RPC means."""
