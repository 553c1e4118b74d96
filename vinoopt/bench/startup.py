"""What a contestant costs before its second inference: in processes of its own, as after a restart."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from vinoopt.bench.contestants import Contestant, Engine, MeasureMode, Sample
from vinoopt.records import Record
from vinoopt.toolchains.process import run_child

TIMEOUT_S = 600.0


class StartUp(Record):
    """Times and memory of fresh processes that open a model and run it."""

    compile_ms: float
    """From the file to a model that is ready."""
    first_inference_ms: float
    cached_compile_ms: float | None = None
    """The same with OpenVINO's model cache, filled before; None where the engine has none, or for a blob."""
    cached_first_inference_ms: float | None = None
    peak_memory_bytes: int
    """The highest resident memory, without what the process held before it opened the model (Python and the
    libraries' code)."""


def start_up(contestant: Contestant, sample: Sample, *, mode: MeasureMode) -> StartUp | None:
    """Start-up of the contestant, measured in up to three processes; None for what is compiled already.

    The first process opens the model without a cache, the second fills a model cache, the third uses it. Raises
    `ToolchainError` where a process dies.
    """
    model = contestant.model
    if not isinstance(model, ov.Model | Path):
        return None
    with tempfile.TemporaryDirectory(prefix="vinoopt-start-") as folder:
        path = _as_file(model, Path(folder))
        inputs = Path(folder) / "sample.npz"
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in sample.items()}
        np.savez(inputs, **arrays)
        request: dict[str, Any] = {
            "name": contestant.name,
            "model": str(path.resolve()),
            "device": contestant.device,
            "properties": contestant.hinted(mode),
            "engine": contestant.engine.value,
            "sample": str(inputs),
        }
        cold = _ask(request)
        if contestant.engine is not Engine.OPENVINO or path.suffix == ".blob":
            return StartUp(**cold)
        cache = {**request["properties"], "CACHE_DIR": str(Path(folder) / "cache")}
        _ask({**request, "properties": cache})
        warm = _ask({**request, "properties": cache})
    return StartUp(
        **cold,
        cached_compile_ms=warm["compile_ms"],
        cached_first_inference_ms=warm["first_inference_ms"],
    )


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    found = run_child("vinoopt.bench.startup_worker", request=request, timeout_s=TIMEOUT_S).values
    return {key: found[key] for key in ("compile_ms", "first_inference_ms", "peak_memory_bytes")}


def _as_file(model: ov.Model | Path, folder: Path) -> Path:
    if isinstance(model, Path):
        return model
    path = folder / "model.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    return path
