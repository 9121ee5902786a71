"""Everything that calls a server: the Python client, `convoy predict`, `convoy bench`."""
