"""Opens one model in a process of its own and answers with the times and the memory that it took."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import psutil

from vinoopt.bench.contestants import Contestant, Engine, Runner, open_runner
from vinoopt.bench.memory import peak_bytes
from vinoopt.errors import DeviceError
from vinoopt.toolchains.host import reason_of
from vinoopt.toolchains.process import serve

_MORE_RUNS = 9
"""Inferences behind the first, so that the peak holds what running needs."""
_REFS = Path("/proc/self/clear_refs")


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    with np.load(request["sample"]) as data:
        sample = {name: data[name] for name in data.files}
    engine, path = Engine(request["engine"]), Path(request["model"])
    if engine is Engine.ONNXRUNTIME:
        import onnxruntime  # noqa: F401 - before the memory is noted
    ov.Core()
    contestant = Contestant(
        name=request["name"],
        model=path,
        device=request["device"],
        properties=request["properties"],
        engine=engine,
    )
    before = _mark()
    start = time.perf_counter_ns()
    runner = _opened(contestant, path)
    compiled = time.perf_counter_ns()
    runner.load([sample])
    ready = time.perf_counter_ns()
    runner.infer(0)
    first = time.perf_counter_ns()
    for _ in range(_MORE_RUNS):
        runner.infer(0)
    return {
        "compile_ms": (compiled - start) / 1e6,
        "first_inference_ms": (first - ready) / 1e6,
        "peak_memory_bytes": max(peak_bytes() - before, 0),
    }


def _opened(contestant: Contestant, path: Path) -> Runner:
    """Compiled straight from its file, as deployments do and as the model cache wants it; blobs are imported."""
    if contestant.engine is Engine.ONNXRUNTIME or path.suffix == ".blob":
        return open_runner(contestant)
    try:
        compiled = ov.Core().compile_model(path, contestant.device, dict(contestant.properties))
    except RuntimeError as exc:
        raise DeviceError(f"{contestant.name}: {reason_of(exc)}") from exc
    return open_runner(Contestant(name=contestant.name, model=compiled, device=contestant.device))


def _mark() -> int:
    """Resident bytes now; on Linux the high-water mark begins anew here."""
    if sys.platform.startswith("linux"):
        with suppress(OSError):  # where a container forbids it, the mark holds what importing needed too
            _REFS.write_text("5")
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    serve(_answer)
