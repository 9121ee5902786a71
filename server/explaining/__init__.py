"""Where the evidence for an answer lies, by asking a model about parts of the picture: `convoy explain --method`."""
