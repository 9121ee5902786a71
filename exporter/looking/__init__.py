"""What a network sees, and what its units are for: for the person who decides what to prune."""
