"""The model repository as it is written: folders, config.pbtxt."""
