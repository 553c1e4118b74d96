"""The one measurement protocol: contestants side by side, in interleaved rounds, on this machine.

    result = measure([Contestant(name="float", model=a), Contestant(name="int8", model=b)], samples)
    result.compare("float", "int8").speedup

Nothing else in the package reads a clock around an inference.
"""

from vinoopt.bench.contestants import Contestant, Engine, MeasureMode, Runner, Sample, open_runner
from vinoopt.bench.intervals import Interval, compare, paired_interval
from vinoopt.bench.protocol import BenchResult, MeasureConfig, Progress, measure

__all__ = [
    "BenchResult",
    "Contestant",
    "Engine",
    "Interval",
    "MeasureConfig",
    "MeasureMode",
    "Progress",
    "Runner",
    "Sample",
    "compare",
    "measure",
    "open_runner",
    "paired_interval",
]
