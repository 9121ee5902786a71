"""Convoy's server: batches requests for a model repository onto a CPU or GPU behind the Open Inference Protocol."""
