"""Fewer bits: calibration, Q/DQ, refinement, mixed precision, 16-bit types, training of the quantized graph."""
