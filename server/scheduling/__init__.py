"""Who waits, who is refused, who is served with whom, and when."""
