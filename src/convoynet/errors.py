"""What every error of Convoy is, so that a program can catch them all by one name."""


class ConvoyError(Exception):
    """The root of all errors that Convoy raises on purpose: what a person can be told in one line."""
