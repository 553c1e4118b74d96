"""A compilation's schedule and log as figures, and as warnings that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vinoopt.records import Diagnostic
from vinoopt.toolchains.host import RUNTIME_REQUIREMENTS
from vinoopt.toolchains.npu_compiler import REQUIREMENTS, CompilerOutput
from vinoopt.toolchains.npu_routes import Route
from vinoopt.toolchains.npu_trace import LogFacts, Schedule, read_log, read_schedule

COST_MODEL_NOTE = (
    "it ranks variants; end-to-end was 2 to 3 times higher on the four networks with published figures"
)
_INT8_SHARE_EXPECTED = 0.5
_LOOSE_QUANTIZERS_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A compiler's output, read."""

    toolchain: str
    schedule: Schedule | None
    is_lower_bound: bool
    diagnostics: tuple[Diagnostic, ...]
    details: Mapping[str, str]

    @classmethod
    def of(cls, route: Route, result: CompilerOutput, *, is_quantized: bool) -> Summary:
        """Figures and warnings of one compilation; raises `ToolchainCrashed` for a schedule it cannot read."""
        requirements = str(result.values.get(REQUIREMENTS, ""))
        version = re.search(r"compiler=([\d.]+)", requirements)
        toolchain = (
            f"Intel NPU compiler {version.group(1) if version else ''} ({route.name}, {route.version})"
        )
        details = {"route": route.name, "openvino": result.openvino, RUNTIME_REQUIREMENTS: requirements}
        if result.schedule is None:
            return cls(
                toolchain=toolchain, schedule=None, is_lower_bound=False, diagnostics=(), details=details
            )
        schedule, facts = read_schedule(result.schedule), read_log(result.log)
        tiles = re.search(r"\bt=(\d+)", requirements)
        details |= _schedule_details(schedule, facts, tiles=tiles.group(1) if tiles else "")
        return cls(
            toolchain=toolchain,
            schedule=schedule,
            is_lower_bound=bool(facts.unmodelled or facts.invalid_costs),
            diagnostics=tuple(_diagnostics(schedule, facts, is_quantized=is_quantized)),
            details=details,
        )


def _schedule_details(schedule: Schedule, facts: LogFacts, *, tiles: str) -> dict[str, str]:
    details = {f"{engine.lower()}_us": f"{us:g}" for engine, us in schedule.engine_us.items()}
    details |= {
        "tiles": tiles,
        "clock_mhz": f"{schedule.clock_mhz:g}",
        "compiler_id": facts.compiler,
        "memory_bound": f"{schedule.memory_bound:.3f}",
        "sparse_tasks": str(facts.sparse_tasks),
        "uncounted": str(len(facts.unmodelled) + facts.invalid_costs),
        "source": (
            f"Intel's VPUNN cost model in the NPU compiler, {tiles} tiles at {schedule.clock_mhz:g} MHz: "
            f"{COST_MODEL_NOTE}"
        ),
    }
    share = _int_share(facts)
    return details if share is None else {**details, "int_share": f"{share:.4f}"}


def _int_share(facts: LogFacts) -> float | None:
    """Share of integer operations; None where the platform reports no counts."""
    if facts.float_operations is None or facts.integer_operations is None:
        return None
    total = facts.float_operations + facts.integer_operations
    return facts.integer_operations / total if total else None


def _diagnostics(schedule: Schedule, facts: LogFacts, *, is_quantized: bool) -> Iterator[Diagnostic]:
    if facts.unmodelled:
        yield _warning(
            "NPU_ESTIMATE_INCOMPLETE",
            f"the latency is a lower bound: the cost model counts {', '.join(facts.unmodelled)} as nothing",
        )
    if facts.invalid_costs:
        yield _warning(
            "NPU_ESTIMATE_INCOMPLETE",
            f"the latency is a lower bound: the cost model has no cost for {facts.invalid_costs} tasks",
        )
    share = _int_share(facts)
    if is_quantized and share is not None and share < _INT8_SHARE_EXPECTED:
        yield _warning(
            "NPU_NOT_INT8",
            f"the model is quantized, but only {share:.0%} of its operations run in integers; the layers' "
            "formats show which do not",
        )
    loose = [
        layer for layer in schedule.layers if layer.type == "FakeQuantize" and layer.busy_us.get("SHAVE")
    ]
    loose_us = sum(layer.time_us or 0.0 for layer in loose)
    if loose_us > _LOOSE_QUANTIZERS_SHARE * schedule.total_us:
        yield _warning(
            "NPU_LOOSE_QUANTIZERS",
            f"{len(loose)} quantizers run as programs of their own and take {loose_us / schedule.total_us:.0%} "
            "of the latency, most of it avoidable: quantize with preset performance, and fold constants first, "
            "so that weights are quantized when the network is compiled",
        )


def _warning(code: str, message: str) -> Diagnostic:
    return Diagnostic(severity="warning", code=code, message=message)
