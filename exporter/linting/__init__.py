"""What a runtime will refuse, misread or run badly in an ONNX file."""
