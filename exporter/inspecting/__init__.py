"""What each layer of a network costs and sees."""
