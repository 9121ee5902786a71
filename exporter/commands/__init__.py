"""The commands: flags in, one line and an exit code out. Importable without torch and onnx."""
