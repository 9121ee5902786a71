"""TensorRT engines: built from ONNX graphs (`build`), and run on a GPU."""
