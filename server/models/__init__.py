"""How models come, run and go."""
