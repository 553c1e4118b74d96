"""vinoopt: the deployment compiler for Intel CPUs, iGPUs and NPUs."""

from vinoopt._version import __version__ as __version__
