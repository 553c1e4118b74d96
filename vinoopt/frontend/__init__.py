"""ONNX files to normalised OpenVINO models."""
