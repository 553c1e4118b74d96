"""NPU blobs and modelled latency without an NPU: Intel's own compiler, wherever it can be reached.

The compiler is the real one, so what it refuses an NPU refuses, and the blob holds the true weights. Times come
from its cost model and are never measurements.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openvino as ov
from pydantic import Field

from vinoopt import serde
from vinoopt.errors import TargetError, ToolchainError, ToolchainMissing, ToolchainRefused
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
from vinoopt.toolchains import npu_preflight, npu_rewrites
from vinoopt.toolchains.npu_compiler import (
    BLOB_FILE,
    MEMORY_LIMIT_BYTES,
    WEIGHTS_SPARSITY,
    CompilerCall,
    call_compiler,
    mode_params,
    with_mode_param,
)
from vinoopt.toolchains.npu_report import Summary
from vinoopt.toolchains.npu_routes import NpuPlaces, Route, RouteOption, find_routes, harness_sha256
from vinoopt.toolchains.npu_trace import SCHEDULER
from vinoopt.toolchains.process import child_folder

DEFAULT_TIMEOUT_S = 600.0

FindRoutes = Callable[[str, NpuPlaces], tuple[RouteOption, ...]]


class NpuEstimate(Record):
    """Modelled latency of a model on an NPU, and where it is spent."""

    properties: RuntimeProperties
    """What was compiled with: what was asked for, and `enable-weights-sparsity=false` where that is better."""
    latency_ms: float
    layer_us: dict[str, float]
    """Layer, by its friendly name in the IR -> its share of the latency; `(scheduling)` for the rest."""
    is_lower_bound: bool
    uncounted: int
    """Kinds of programs, and tasks, that the cost model counts as nothing."""
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

    def require_cost_model(self, spec: DeviceSpec) -> None:
        """Raises `ToolchainMissing`, with how to get one, where no route here models latency for the device."""
        self._route(spec, needs_cost_model=True)

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

        Where the compiler stores weights sparsely, it is compiled without that too and the smaller estimate
        kept, unless `properties` decide it; the build's properties and diagnostics say what was kept.
        `evidence` is `MODELLED`, or `COMPILED` where the NPU's own driver compiled it, which models nothing.
        Raises `ShapeError` for open dimensions, `ToolchainRefused`, `ToolchainMissing`, `ToolchainCrashed`,
        `ToolchainTimeout`.
        """
        route = self._route(spec, needs_cost_model=False)
        return self._compile_best(
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
        form = sorted(NpuEstimate.model_fields)
        key = (route.version, route.compiler_stamp, harness_sha256(), form, npu_rewrites.VERSION)
        store = Store.open(*key, root=self.places.cache / "npu-estimates")
        content = _content_key(model_path, _platform(spec), properties)

        def compute() -> Any:
            with child_folder() as folder:
                build = self._compile_best(
                    route,
                    model_path,
                    spec=spec,
                    properties=properties,
                    output=folder / BLOB_FILE,
                    timeout_s=timeout_s,
                )
            return _estimate_of(build).model_dump(mode="json")

        return serde.from_mapping(NpuEstimate, store.json(content, compute), where="kept NPU estimate")

    def _compile_best(
        self,
        route: Route,
        model_path: Path,
        *,
        spec: DeviceSpec,
        properties: RuntimeProperties,
        output: Path,
        timeout_s: float,
    ) -> Build:
        """The better of sparse and dense weights, as the cost model sees it."""
        kept = self._compile(
            route, model_path, spec=spec, properties=properties, output=output, timeout_s=timeout_s
        )
        if kept.details.get("sparse_tasks", "0") == "0" or WEIGHTS_SPARSITY in mode_params(properties):
            return kept
        with child_folder() as folder:
            try:
                dense = self._compile(
                    route,
                    model_path,
                    spec=spec,
                    properties=with_mode_param(properties, WEIGHTS_SPARSITY, "false"),
                    output=folder / output.name,
                    timeout_s=timeout_s,
                )
            except ToolchainError as exc:
                return serde.replace(kept, diagnostics=(*kept.diagnostics, _dense_failed(exc)))
            if _latency(dense) >= _latency(kept):
                return kept
            shutil.copyfile(folder / output.name, output)
        return serde.replace(dense, diagnostics=(*dense.diagnostics, _dense_is_better(dense, sparse=kept)))

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
        rewritten = npu_rewrites.rewrite(model, platform)
        with child_folder() as folder:
            if rewritten:
                model_path = folder / "rewritten.xml"
                ov.save_model(model, model_path, compress_to_fp16=False)
            call = CompilerCall(
                model=model_path,
                platform=platform,
                properties=properties.as_dict(),
                timeout_s=timeout_s,
                memory_limit_bytes=self.memory_limit_bytes,
            )
            try:
                result = call_compiler(route, call, blob=output)
            except ToolchainRefused as exc:
                raise ToolchainRefused(npu_rewrites.explained(model, str(exc))) from exc
        is_quantized = any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
        summary = Summary.of(route, result, is_quantized=is_quantized)
        return Build(
            target=Target(profile=spec.name, device=spec.kind),
            toolchain=summary.toolchain,
            evidence=Evidence.COMPILED if summary.schedule is None else Evidence.MODELLED,
            properties=properties,
            blob=output.name,
            blob_sha256=serde.sha256_file(output),
            compile_ms=result.compile_ms,
            latency_ms=None if summary.schedule is None else round(summary.schedule.total_us / 1000, 6),
            is_lower_bound=summary.is_lower_bound,
            layers=() if summary.schedule is None else summary.schedule.layers,
            diagnostics=(*findings, *rewritten, *summary.diagnostics),
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


def _latency(build: Build) -> float:
    if build.latency_ms is None:
        raise ToolchainMissing(f"{build.toolchain} models no latency")
    return build.latency_ms


def _dense_failed(error: ToolchainError) -> Diagnostic:
    return Diagnostic(
        severity="info",
        code="NPU_SPARSITY_UNDECIDED",
        message=f"compiled with weight sparsity; without it the compilation failed: {error}",
    )


def _dense_is_better(dense: Build, *, sparse: Build) -> Diagnostic:
    return Diagnostic(
        severity="info",
        code="NPU_SPARSITY_OFF",
        message=(
            f"compiled without weight sparsity: modelled {_latency(dense):.4g} ms instead of "
            f"{_latency(sparse):.4g} ms, though the blob has {dense.details['blob_bytes']} bytes instead of "
            f"{sparse.details['blob_bytes']} and convolutions take {dense.details['dpu_us']} us instead of "
            f"{sparse.details['dpu_us']} us; the cost model prices copies of sparse weights far above those of "
            "dense ones, and whether an NPU does too is not known"
        ),
    )


def _content_key(model_path: Path, platform: str, properties: RuntimeProperties) -> str:
    """Digest of everything that the compiler sees."""
    digest = hashlib.sha256(serde.to_json(properties).encode() + platform.encode())
    for path in (model_path, model_path.with_suffix(".bin")):
        digest.update(serde.sha256_file(path).encode() if path.is_file() else b"-")
    return digest.hexdigest()[:40]


def _estimate_of(build: Build) -> NpuEstimate:
    layer_us: dict[str, float] = {}
    for layer in build.layers:
        layer_us[layer.name] = layer_us.get(layer.name, 0.0) + (layer.time_us or 0.0)
    layer_us.setdefault(SCHEDULER, 0.0)
    details = build.details
    return NpuEstimate(
        properties=build.properties,
        latency_ms=_latency(build),
        layer_us=layer_us,
        is_lower_bound=build.is_lower_bound,
        uncounted=int(details["uncounted"]),
        source=details["source"],
        warnings=tuple(each.message for each in build.diagnostics if each.severity == "warning"),
    )
