"""The one measurement protocol: contestants side by side, in interleaved rounds, on this machine.

    result = measure([Contestant(name="float", model=a), Contestant(name="int8", model=b)], samples)
    result.compare("float", "int8").speedup

Nothing else in the package reads a clock around an inference.
"""

from vinoopt.bench.contestants import Contestant, Engine, MeasureMode, Runner, Sample, open_runner
from vinoopt.bench.intervals import Interval, compare, paired_interval
from vinoopt.bench.protocol import BenchResult, MeasureConfig, Progress, measure
from vinoopt.bench.runs import BenchRecord, RunComparison, compare_runs
from vinoopt.bench.startup import StartUp, start_up

__all__ = [
    "BenchRecord",
    "BenchResult",
    "Contestant",
    "Engine",
    "Interval",
    "MeasureConfig",
    "MeasureMode",
    "Progress",
    "RunComparison",
    "Runner",
    "Sample",
    "StartUp",
    "compare",
    "compare_runs",
    "measure",
    "open_runner",
    "paired_interval",
    "start_up",
]
