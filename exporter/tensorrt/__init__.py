"""TensorRT engines, built from ONNX graphs: docs/tensorrt.md."""
