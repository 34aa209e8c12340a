"""A Program written as ONNX, checked against torch before anything reaches the disk."""
