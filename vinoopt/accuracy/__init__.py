"""Data, metrics and paired accuracy drops."""
