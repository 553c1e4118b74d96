"""The NPU compiler's schedule and log, read: how long, where, in which format, and what was not counted.

The compiler places every task (DPU: convolutions and matrix products; SHAVE: vector programs; DMA: copies) on
a time line with durations of VPUNN, Intel's cost model, and writes it as a Chrome trace.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vinoopt.errors import ToolchainCrashed
from vinoopt.records import LayerReport

ENGINES = {"DPU": "DPU", "Shave": "SHAVE", "DMA": "DMA"}
"""Category of a trace event -> engine."""
SCHEDULER = "(scheduling)"
"""Stands for tasks that belong to no layer: barriers and the fetching of descriptors."""

_HARMLESS_SHAVE = re.compile(r"^(builtin_Convert\b|cache_)")
_UNMODELLED = re.compile(r"SHAVE operations are unsupported by VPUNN[^\[]*\[([^\]]*)\]")
_INVALID_COST = re.compile(r"There are (\d+) tasks with invalid cost")
_SPARSE = re.compile(r"Sparse weights - (\d+) ops")
_OPERATIONS = re.compile(r"Total number of (FP|INT)Ops: (\d+)")
_COMPILER_ID = re.compile(r"Current compiler ID: (\S+)")
_ELEMENT = re.compile(r"x(!?[a-zA-Z][\w.]*(?:<[^>]*>)?)[\],]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The modelled time line of one inference."""

    total_us: float
    clock_mhz: float
    layers: tuple[LayerReport, ...]
    """Their `time_us` add up to `total_us`, together with that of `SCHEDULER`."""
    engine_us: Mapping[str, float]
    """Engine -> time in which at least one of its tasks runs."""
    memory_bound: float
    """Share of the total in which only DMA runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFacts:
    """What the compiler's log says beyond the schedule."""

    compiler: str
    unmodelled: tuple[str, ...]
    """SHAVE programs that the cost model counts as (nearly) free."""
    invalid_costs: int
    sparse_tasks: int
    """Tasks whose weights are stored without their zeros."""
    float_operations: int | None
    integer_operations: int | None
    """Both counts include padding, so only their ratio tells; 3720 reports none."""


def read_schedule(trace: Mapping[str, Any]) -> Schedule:
    """The time line in a trace; raises `ToolchainCrashed` where it is not one of this compiler's."""
    try:
        statistics = trace["taskStatistics"]
        total = float(statistics["total duration"])
        tasks = [_Task.of(event) for event in trace["traceEvents"] if _is_task(event)]
        return Schedule(
            total_us=total,
            clock_mhz=float(trace["workpoint"]["freq"]),
            layers=tuple(_layers(tasks, total)),
            engine_us={
                "DPU": float(statistics["DPU duration"]),
                "SHAVE": float(statistics["SW duration"]),
                "DMA": float(statistics["DMA duration"]),
            },
            memory_bound=float(statistics["DMA duration without overlaps"]) / total if total else 0.0,
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise ToolchainCrashed(f"the NPU compiler's schedule cannot be read: {exc!r}") from exc


def read_log(log: str) -> LogFacts:
    """The facts in a log taken at `LOG_INFO`."""
    unmodelled = {
        name.strip().removeprefix("builtin_")
        for names in _UNMODELLED.findall(log)
        for name in names.split(",")
        if name.strip() and not _HARMLESS_SHAVE.match(name.strip())
    }
    operations = {kind: int(count) for kind, count in _OPERATIONS.findall(log)}
    compiler = _COMPILER_ID.search(log)
    return LogFacts(
        compiler=compiler.group(1) if compiler else "",
        unmodelled=tuple(sorted(unmodelled)),
        sparse_tasks=sum(map(int, _SPARSE.findall(log))),
        invalid_costs=max(map(int, _INVALID_COST.findall(log)), default=0),
        float_operations=operations.get("FP"),
        integer_operations=operations.get("INT"),
    )


# --------------------------------------------------------------------------- layers


@dataclass(frozen=True, slots=True)
class _Task:
    layer: str
    type: str
    engine: str
    start: float
    end: float
    precision: str

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> _Task:
        """A task; its name is the layer's friendly name, `?t_`, the layer's type, and what became of it."""
        layer, mark, rest = str(event["name"]).partition("?t_")
        start = float(event["ts"])
        element = _ELEMENT.search(str(event["args"].get("Input tensors", "")))
        return cls(
            layer=layer if mark else SCHEDULER,
            type=rest.partition("/")[0],
            engine=ENGINES[event["cat"]],
            start=start,
            end=start + float(event["dur"]),
            precision=_format_name(element.group(1)) if element else "",
        )


def _format_name(element: str) -> str:
    """OpenVINO's name of an element type: the compiler writes `ui8` and `si8`."""
    return re.sub(r"^(u|s)i(?=\d)", lambda found: "u" if found.group(1) == "u" else "i", element)


def _is_task(event: Mapping[str, Any]) -> bool:
    """Whether an event is a task, and not one of the workloads into which a DPU task is cut."""
    return event.get("cat") in ENGINES and "/variant_" not in str(event["name"])


def _layers(tasks: list[_Task], total: float) -> Iterable[LayerReport]:
    """Layers in the order in which they start."""
    shares = _shares(tasks)
    busy: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    weight: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for task in tasks:
        busy[task.layer][task.engine] += task.end - task.start
        if task.engine != "DMA":
            weight[task.layer][task.precision] += task.end - task.start
    shares[SCHEDULER] = max(0.0, total - sum(us for name, us in shares.items() if name != SCHEDULER))
    ordered = sorted(tasks, key=lambda task: (task.start, task.layer))
    types = {task.layer: task.type for task in reversed(ordered)}
    for name in dict.fromkeys(task.layer for task in ordered):
        formats = weight[name]
        engines = {engine: round(us, 3) for engine, us in sorted(busy[name].items()) if us > 0}
        yield LayerReport(
            name=name,
            type=types[name],
            precision=max(formats, key=lambda key: (formats[key], key)) if formats else "",
            kernel="+".join(engines),
            time_us=round(shares.get(name, 0.0), 3),
            busy_us=engines,
        )


def _shares(tasks: list[_Task]) -> dict[str, float]:
    """Each layer's share of the time line: at any moment, computing layers share it, else copying ones.

    Tasks overlap, so sums of durations exceed the total; what a layer adds to the latency is the time in
    which it keeps the engines busy, and a copy hidden behind computation adds nothing.
    """
    edges = sorted({edge for task in tasks for edge in (task.start, task.end)})
    starts = sorted(tasks, key=lambda task: task.start)
    shares: dict[str, float] = defaultdict(float)
    running: list[_Task] = []
    upcoming = 0
    for left, right in pairwise(edges):
        running = [task for task in running if task.end > left]
        while upcoming < len(starts) and starts[upcoming].start <= left:
            if starts[upcoming].end > left:
                running.append(starts[upcoming])
            upcoming += 1
        computing = {task.layer for task in running if task.engine != "DMA"}
        for layer in computing or {task.layer for task in running}:
            shares[layer] += (right - left) / len(computing or {task.layer for task in running})
    return shares
