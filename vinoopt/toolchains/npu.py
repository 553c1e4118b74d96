"""NPU blobs and modelled latency without an NPU: Intel's own compiler, wherever it can be reached.

The compiler is the real one, so what it refuses an NPU refuses, and the blob holds the true weights. Times come
from its cost model and are never measurements.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from vinoopt import serde
from vinoopt.errors import TargetError, ToolchainMissing
from vinoopt.records import (
    Availability,
    Build,
    DeviceSpec,
    Diagnostic,
    Evidence,
    NpuOffline,
    Record,
    RuntimeProperties,
    Target,
)
from vinoopt.store import Store
from vinoopt.toolchains import npu_preflight
from vinoopt.toolchains.npu_compiler import (
    BLOB_FILE,
    MEMORY_LIMIT_BYTES,
    CompilerCall,
    CompilerOutput,
    call_compiler,
)
from vinoopt.toolchains.npu_routes import NpuPlaces, Route, RouteOption, find_routes, harness_sha256
from vinoopt.toolchains.npu_trace import SCHEDULER, LogFacts, Schedule, read_log, read_schedule
from vinoopt.toolchains.process import child_folder

DEFAULT_TIMEOUT_S = 600.0
COST_MODEL_NOTE = (
    "it ranks variants; end-to-end was 2 to 3 times higher on the four networks with published figures"
)
_INT8_SHARE_EXPECTED = 0.5

FindRoutes = Callable[[str, NpuPlaces], tuple[RouteOption, ...]]


class NpuEstimate(Record):
    """Modelled latency of a model on an NPU, and where it is spent."""

    latency_ms: float
    layer_us: dict[str, float]
    """Layer, by its friendly name in the IR -> its share of the latency; `(scheduling)` for the rest."""
    is_lower_bound: bool
    uncounted: int
    """Kinds of programs, and tasks, that the cost model counts as nothing."""
    tiles: int | None = None
    blob_bytes: int
    dpu_us: float
    memory_bound: float
    """Share of the latency in which only copies run."""
    source: str
    warnings: tuple[str, ...] = Field(default=())


@dataclass(frozen=True, kw_only=True)
class NpuToolchain:
    """Intel's NPU compiler by the first route that this machine offers."""

    places: NpuPlaces = field(default_factory=NpuPlaces.from_environment)
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES
    find: FindRoutes = find_routes

    def routes(self, spec: DeviceSpec) -> tuple[Availability, ...]:
        """Every route in the order in which they are tried, with what is missing and how to get it."""
        return tuple(option.availability for option in self.find(_platform(spec), self.places))

    def probe(self, spec: DeviceSpec) -> Availability:
        """The first route that is available, else all reasons why none is."""
        tried = self.routes(spec)
        ready = next((each for each in tried if each.ok), None)
        if ready is not None:
            return ready
        return Availability(
            ok=False,
            name="NPU compiler",
            reason="; ".join(f"{each.name}: {each.reason}" for each in tried),
            fix="; or ".join(dict.fromkeys(each.fix for each in reversed(tried) if each.fix)),
        )

    def compile(
        self,
        model_path: Path,
        spec: DeviceSpec,
        *,
        properties: RuntimeProperties,
        output: Path,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Build:
        """The IR compiled to a blob at `output`, with the modelled latency and time of every layer.

        `evidence` is `MODELLED`, or `COMPILED` where the NPU's own driver compiled it, which models nothing.
        Raises `ShapeError` for open dimensions, `ToolchainRefused`, `ToolchainMissing`, `ToolchainCrashed`,
        `ToolchainTimeout`.
        """
        route = self._route(spec, needs_cost_model=False)
        return self._compile(
            route, model_path, spec=spec, properties=properties, output=output, timeout_s=timeout_s
        )

    def estimate_latency(
        self,
        model_path: Path,
        spec: DeviceSpec,
        properties: RuntimeProperties,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> NpuEstimate:
        """Modelled latency of the IR and of its layers; kept by content of model, properties and compiler.

        Raises what `compile` raises, and `ToolchainMissing` where only a route without a cost model is here.
        """
        route = self._route(spec, needs_cost_model=True)
        store = Store.open("npu-estimates", route.version, harness_sha256(), root=self.places.cache / "npu")
        key = _content_key(model_path, _platform(spec), properties)

        def compute() -> Any:
            with child_folder() as folder:
                build = self._compile(
                    route,
                    model_path,
                    spec=spec,
                    properties=properties,
                    output=folder / BLOB_FILE,
                    timeout_s=timeout_s,
                )
            return _estimate_of(build).model_dump(mode="json")

        return serde.from_mapping(NpuEstimate, store.json(key, compute), where="kept NPU estimate")

    def _compile(
        self,
        route: Route,
        model_path: Path,
        *,
        spec: DeviceSpec,
        properties: RuntimeProperties,
        output: Path,
        timeout_s: float,
    ) -> Build:
        platform = _platform(spec)
        model = npu_preflight.read_ir(model_path)
        findings = npu_preflight.check(model, platform)
        npu_preflight.refuse(findings)
        call = CompilerCall(
            model=model_path,
            platform=platform,
            properties=properties.as_dict(),
            timeout_s=timeout_s,
            memory_limit_bytes=self.memory_limit_bytes,
        )
        result = call_compiler(route, call, blob=output)
        is_quantized = any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
        summary = _Summary.of(route, result, is_quantized=is_quantized)
        return Build(
            target=Target(profile=spec.name, device=spec.kind),
            toolchain=summary.toolchain,
            evidence=Evidence.COMPILED if summary.schedule is None else Evidence.MODELLED,
            properties=properties,
            blob=output.name,
            blob_sha256=serde.sha256_file(output),
            compile_ms=result.compile_ms,
            latency_ms=None if summary.schedule is None else summary.schedule.total_us / 1000,
            is_lower_bound=summary.is_lower_bound,
            layers=() if summary.schedule is None else summary.schedule.layers,
            diagnostics=(*findings, *summary.diagnostics),
            details={"platform": platform, "blob_bytes": str(output.stat().st_size), **summary.details},
        )

    def _route(self, spec: DeviceSpec, *, needs_cost_model: bool) -> Route:
        for option in self.find(_platform(spec), self.places):
            if option.route is not None and (option.route.has_cost_model or not needs_cost_model):
                return option.route
        absent = self.probe(spec)
        if absent.ok:
            raise ToolchainMissing(f"{absent.name} compiles, but models no latency; {self._all_fixes(spec)}")
        raise ToolchainMissing(f"no NPU compiler can be reached here ({absent.reason}); {absent.fix}")

    def _all_fixes(self, spec: DeviceSpec) -> str:
        return "; or ".join(each.fix for each in reversed(self.routes(spec)) if each.fix)


def _platform(spec: DeviceSpec) -> str:
    if isinstance(spec.offline, NpuOffline):
        return spec.offline.platform
    raise TargetError(
        f'device "{spec.name}" names no NPU platform; give its profile [devices.NPU.offline] platform = "4000"'
    )


def _content_key(model_path: Path, platform: str, properties: RuntimeProperties) -> str:
    """Digest of everything that the compiler sees."""
    digest = hashlib.sha256(serde.to_json(properties).encode() + platform.encode())
    for path in (model_path, model_path.with_suffix(".bin")):
        digest.update(serde.sha256_file(path).encode() if path.is_file() else b"-")
    return digest.hexdigest()[:40]


# --------------------------------------------------------------------------- what a compilation said


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """A compiler's output, read."""

    toolchain: str
    schedule: Schedule | None
    is_lower_bound: bool
    diagnostics: tuple[Diagnostic, ...]
    details: Mapping[str, str]

    @classmethod
    def of(cls, route: Route, result: CompilerOutput, *, is_quantized: bool) -> _Summary:
        compatibility = str(result.values.get("RUNTIME_REQUIREMENTS", ""))
        version = re.search(r"compiler=([\d.]+)", compatibility)
        toolchain = (
            f"Intel NPU compiler {version.group(1) if version else ''} ({route.name}, {route.version})"
        )
        details = {"route": route.name, "openvino": result.openvino, "compatibility": compatibility}
        if result.schedule is None:
            return cls(
                toolchain=toolchain, schedule=None, is_lower_bound=False, diagnostics=(), details=details
            )
        schedule, facts = read_schedule(result.schedule), read_log(result.log)
        tiles = re.search(r"\bt=(\d+)", compatibility)
        details |= _schedule_details(schedule, facts, tiles=tiles.group(1) if tiles else "")
        return cls(
            toolchain=toolchain,
            schedule=schedule,
            is_lower_bound=bool(facts.unmodelled or facts.invalid_costs),
            diagnostics=tuple(_diagnostics(facts, is_quantized=is_quantized)),
            details=details,
        )


def _schedule_details(schedule: Schedule, facts: LogFacts, *, tiles: str) -> dict[str, str]:
    details = {f"{engine.lower()}_us": f"{us:g}" for engine, us in schedule.engine_us.items()}
    details |= {
        "tiles": tiles,
        "clock_mhz": f"{schedule.clock_mhz:g}",
        "compiler_id": facts.compiler,
        "memory_bound": f"{schedule.memory_bound:.3f}",
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


def _diagnostics(facts: LogFacts, *, is_quantized: bool) -> list[Diagnostic]:
    found = []
    if facts.unmodelled:
        found.append(
            _warning(
                "NPU_ESTIMATE_INCOMPLETE",
                f"the latency is a lower bound: the cost model counts {', '.join(facts.unmodelled)} as nothing",
            )
        )
    if facts.invalid_costs:
        found.append(
            _warning(
                "NPU_ESTIMATE_INCOMPLETE",
                f"the latency is a lower bound: the cost model has no cost for {facts.invalid_costs} tasks",
            )
        )
    share = _int_share(facts)
    if is_quantized and share is not None and share < _INT8_SHARE_EXPECTED:
        found.append(
            _warning(
                "NPU_NOT_INT8",
                f"the model is quantized, but only {share:.0%} of its operations run in integers; the layers' "
                "formats show which do not",
            )
        )
    return found


def _warning(code: str, message: str) -> Diagnostic:
    return Diagnostic(severity="warning", code=code, message=message)


def _estimate_of(build: Build) -> NpuEstimate:
    layer_us: dict[str, float] = {}
    for layer in build.layers:
        layer_us[layer.name] = layer_us.get(layer.name, 0.0) + (layer.time_us or 0.0)
    layer_us.setdefault(SCHEDULER, 0.0)
    details, latency_ms = build.details, build.latency_ms
    if latency_ms is None:
        raise ToolchainMissing(f"{build.toolchain} models no latency")
    return NpuEstimate(
        latency_ms=latency_ms,
        layer_us=layer_us,
        is_lower_bound=build.is_lower_bound,
        uncounted=int(details["uncounted"]),
        tiles=int(details["tiles"]) if details["tiles"] else None,
        blob_bytes=int(details["blob_bytes"]),
        dpu_us=float(details["dpu_us"]),
        memory_bound=float(details["memory_bound"]),
        source=details["source"],
        warnings=tuple(each.message for each in build.diagnostics if each.severity == "warning"),
    )
