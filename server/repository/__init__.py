"""A model repository on disk or far away, from config.pbtxt to a spec."""
