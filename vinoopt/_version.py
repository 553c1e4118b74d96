"""The package's version, read by the build and by the manifest of every bundle."""

__version__ = "0.1.0"
