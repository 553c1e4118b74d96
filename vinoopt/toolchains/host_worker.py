"""The child that compiles for a GPU or NPU of this machine: their plugins and drivers may hang or crash.

Started by `host.py`. It leaves the blob and, where the request names inputs, the device's outputs for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from vinoopt.errors import ToolchainRefused
from vinoopt.toolchains.calls import read_calls, write_calls
from vinoopt.toolchains.host import BLOB_FILE, OUTPUTS_FILE, describe_layers, reason_of, requirements_of
from vinoopt.toolchains.process import serve


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """How long it took, what became of the layers, and what the model needs of the machine that runs it."""
    started = time.monotonic()
    try:
        compiled = ov.Core().compile_model(request["model"], request["device"], request["properties"])
        compile_ms = (time.monotonic() - started) * 1e3
        Path(BLOB_FILE).write_bytes(compiled.export_model().getvalue())
        if request["calls"] is not None:
            write_calls(Path(OUTPUTS_FILE), _outputs(compiled, Path(request["calls"])))
    except RuntimeError as exc:
        raise ToolchainRefused(
            f"OpenVINO's {request['device']} plugin refused the model: {reason_of(exc)}"
        ) from exc
    return {
        "compile_ms": compile_ms,
        "layers": [layer.model_dump(mode="json") for layer in describe_layers(compiled)],
        "requirements": requirements_of(compiled),
    }


def _outputs(compiled: ov.CompiledModel, calls: Path) -> Iterator[dict[str, NDArray[Any]]]:
    for call in read_calls(calls):
        yield {str(number): np.array(value) for number, value in enumerate(compiled(call).values())}


if __name__ == "__main__":  # a process started by multiprocessing imports this module again
    serve(answer)
