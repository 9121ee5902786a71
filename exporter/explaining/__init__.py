"""Why a network answers so: maps of evidence, as outputs of the graph itself."""
