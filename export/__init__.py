"""Stage 3: a student becomes a verified ONNX bundle."""
