"""Joint pruning and quantization of an OpenVINO model."""
