"""Opens a bundle as its user will: with `openvino` and `numpy` alone, in a process of its own.

Run as a child: it answers with how far the replayed outputs depart from the golden ones.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from vinoopt.records import Precision
from vinoopt.toolchains.host import requirements_of
from vinoopt.toolchains.process import serve

MODEL, BLOB = "model.xml", "model.blob"
TOLERANCES = {Precision.F32: 1e-3, Precision.F16: 3e-2, Precision.BF16: 5e-2, Precision.INT8: 1e-1}
"""Largest departure of a replay from golden outputs, relative to the output's largest value. Kernels of another
CPU add in another order (f32), round to 8 or 11 bits of mantissa (bf16, f16), or land on the neighbouring
quantization step, one of 255, in several layers in a row (int8)."""
CHOICE_TOLERANCE = 0.05
"""Share of ids, or of rows that the model selects, which may differ: near equal scores are ordered by chance."""
_SELECTING = ("NonMaxSuppression", "Nms", "DetectionOutput", "TopK", "NonZero")
"""Ends of the names of operators that choose and order what they hand on."""


def replay(
    folder: Path,
    target: str,
    device: str,
    *,
    properties: dict[str, str] | None = None,
    file: str = MODEL,
    export: Path | None = None,
) -> dict[str, Any]:
    """Largest departure of all golden calls, relative to the largest golden value of its output.

    `folder` is the bundle, `target` the name of the target's folder in it, `device` OpenVINO's; `properties`
    replace those in the target's folder. `file` is what is opened: the IR, which is compiled, or the blob, which is
    imported; `export` is where a blob of it is left. The departure of an output is max|y - golden| / max|golden|
    over all calls; what is not finite has to be so in both, else it counts as infinite. Of outputs that hold ids, or
    rows that the model selects and orders (non-maximum suppression, top k), the share that has no counterpart counts
    instead, as `disagreement`, which may be up to `choice_tolerance`.
    """
    if properties is None:
        properties = json.loads((folder / target / "runtime.json").read_text(encoding="utf-8"))
    core = ov.Core()
    if file == BLOB:
        model = core.import_model(io.BytesIO((folder / target / file).read_bytes()), device, properties)
    else:
        model = core.compile_model(folder / target / file, device, properties)
    if export is not None:
        export.write_bytes(model.export_model().getvalue())
    selected = selected_outputs(core.read_model(folder / target / MODEL))
    request = model.create_infer_request()
    worst = disagreement = 0.0
    with np.load(folder / "golden.npz") as golden:
        tolerance = float(golden[f"tolerance/{target}"])
        calls = int(golden["calls"])
        for call in range(calls):
            inputs = {
                key.removeprefix(f"input/{call}/"): golden[key]
                for key in golden.files
                if key.startswith(f"input/{call}/")
            }
            if request.query_state():
                request.reset_state()
            results = request.infer(inputs)
            for index, output in enumerate(model.outputs):
                expected, actual = golden[f"output/{target}/{call}/{index}"], results[output]
                if expected.dtype.kind in "iub" and expected.dtype.itemsize > 1:
                    disagreement = max(disagreement, differing_share(expected, actual))
                elif index in selected and departure(expected, actual) > tolerance:
                    disagreement = max(disagreement, unmatched_share(expected, actual, tolerance))
                else:
                    worst = max(worst, departure(expected, actual))
    return {
        "departure": worst,
        "disagreement": disagreement,
        "choice_tolerance": CHOICE_TOLERANCE,
        "tolerance": tolerance,
        "calls": calls,
        "openvino": ov.__version__,
        "requirements": requirements_of(model),
    }


def departure(expected: Any, actual: Any) -> float:
    """max|actual - expected| / max|expected| over finite values.

    Infinite for other shapes, and where a value that is not finite is not the one expected.
    """
    e, a = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if e.shape != a.shape:
        return float("inf")
    finite = np.isfinite(e)
    if not np.isfinite(a[finite]).all() or not np.array_equal(e[~finite], a[~finite], equal_nan=True):
        return float("inf")
    e, a = e[finite], a[finite]
    if not e.size:
        return 0.0
    return float(np.abs(a - e).max() / max(float(np.abs(e).max()), 1e-6))


def selected_outputs(model: ov.Model) -> set[int]:
    """Places of outputs that are computed from what the model selects and orders."""
    chosen: set[str] = set()
    for node in model.get_ordered_ops():
        sources = {port.get_source_output().get_node().get_friendly_name() for port in node.inputs()}
        if node.get_type_name().endswith(_SELECTING) or sources & chosen:
            chosen.add(node.get_friendly_name())
    return {
        place for place, result in enumerate(model.get_results()) if result.get_friendly_name() in chosen
    }


def differing_share(expected: Any, actual: Any) -> float:
    """Share of ids that differ; 1 for other shapes."""
    if np.shape(expected) != np.shape(actual):
        return 1.0
    return float(np.mean(np.asarray(expected) != np.asarray(actual))) if np.size(expected) else 0.0


def unmatched_share(expected: Any, actual: Any, tolerance: float) -> float:
    """Share of rows (along the last dimension) without a counterpart within tolerance, in any order.

    The tolerance is relative to the largest expected value of each column. A row serves once.
    """
    e, a = (np.asarray(each, np.float64) for each in (expected, actual))
    if e.ndim < 2 or a.ndim < 2 or e.shape[-1] != a.shape[-1]:
        e, a = e.reshape(-1, 1), a.reshape(-1, 1)
    e, a = e.reshape(-1, e.shape[-1]), a.reshape(-1, a.shape[-1])
    if not len(e) or not len(a):
        return float(len(e) != len(a))
    limits = tolerance * np.maximum(np.abs(e).max(axis=0, initial=0.0), 1e-6)
    is_free = np.ones(len(a), bool)
    for row in e:
        near = np.flatnonzero(is_free & (np.abs(a - row) <= limits).all(axis=1))
        if len(near):
            is_free[near[0]] = False
    matched = int((~is_free).sum())
    return 1 - matched / max(len(e), len(a))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    return replay(
        Path(request["folder"]),
        request["target"],
        request["device"],
        properties=request["properties"],
        file=request["file"],
        export=Path(BLOB) if request["export"] else None,
    )


if __name__ == "__main__":
    serve(_answer)
