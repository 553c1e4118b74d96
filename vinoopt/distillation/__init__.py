"""Label-free distillation: a compressed `ov.Model` is trained, as it is, towards the float model's outputs.

Needs PyTorch (the extra `distill`). Only `entry`, `needs` and `stage` may be imported without it.
"""
