"""Opens a bundle as its user will: with `openvino` and `numpy` alone, in a process of its own.

Run as a child: it answers with the largest departure of the replayed outputs from the golden ones.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from vinoopt.toolchains.host import requirements_of
from vinoopt.toolchains.process import serve

MODEL, BLOB = "model.xml", "model.blob"


def replay(
    folder: Path,
    target: str,
    device: str,
    *,
    properties: dict[str, str] | None = None,
    file: str = MODEL,
    export: Path | None = None,
) -> dict[str, Any]:
    """Largest departure of each golden call, relative to the largest golden value of its output.

    `folder` is the bundle, `target` the name of the target's folder in it, `device` OpenVINO's; `properties`
    replace those in the target's folder. `file` is what is opened: the IR, which is compiled, or the blob, which is
    imported; `export` is where a blob of it is left. The departure of an output is max|y - golden| / max|golden|
    over all calls; what is not finite has to be so in both, else it counts as infinite.
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
    worst = 0.0
    with np.load(folder / "golden.npz") as golden:
        tolerance = float(golden[f"tolerance/{target}"])
        calls = int(golden["calls"])
        for call in range(calls):
            inputs = {
                key.removeprefix(f"input/{call}/"): golden[key]
                for key in golden.files
                if key.startswith(f"input/{call}/")
            }
            results = model(inputs)
            for index, output in enumerate(model.outputs):
                expected = golden[f"output/{target}/{call}/{index}"]
                worst = max(worst, departure(expected, results[output]))
    return {
        "departure": worst,
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
