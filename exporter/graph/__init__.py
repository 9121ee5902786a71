"""ONNX graphs: from PyTorch, back to it, cleaned."""
