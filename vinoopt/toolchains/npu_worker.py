"""Compiles a model for an Intel NPU with OpenVINO's Python API; the twin of `npuh.c`, with the same answer.

::

    python -m vinoopt.toolchains.npu_worker MODEL.xml [-o BLOB] [-g PROPERTY]... [KEY=VALUE]...
    python -m vinoopt.toolchains.npu_worker --devices

It prints one line `@@{json}`. The compiler may end the process at any point, so only that line counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import openvino as ov


def compile_model(
    model: str, properties: dict[str, str], *, asked: list[str], blob: Path | None, device: str = "NPU"
) -> Any:
    """What the harness prints: OpenVINO's build, compile time and what was asked for, or the failure."""
    stage = "core"
    try:
        core = ov.Core()
        stage = "properties"
        core.set_property(device, properties)
        stage = "read"
        network = core.read_model(model)
        stage = "compile"
        started = time.monotonic()
        compiled = core.compile_model(network, device)
        compile_ms = int(1000 * (time.monotonic() - started))
        stage = "export"
        if blob is not None:
            blob.write_bytes(compiled.export_model().getvalue())
    except RuntimeError as exc:
        return {"ok": False, "stage": stage, "message": str(exc)}
    supported = set(compiled.get_property("SUPPORTED_PROPERTIES"))
    values = {key: str(compiled.get_property(key)) for key in asked if key in supported}
    return {"ok": True, "openvino": ov.get_version(), "compile_ms": compile_ms, "properties": values}


def list_devices() -> Any:
    """Architecture (as `4000`) and driver version of the NPU that OpenVINO sees here, if it sees one."""
    core = ov.Core()
    if "NPU" not in core.available_devices:
        return {"ok": True, "openvino": ov.get_version(), "architecture": None}
    return {
        "ok": True,
        "openvino": ov.get_version(),
        "architecture": str(core.get_property("NPU", "DEVICE_ARCHITECTURE")),
        "driver": str(core.get_property("NPU", "NPU_DRIVER_VERSION")),
    }


def main(arguments: list[str]) -> None:
    """Print the answer and leave at once: libraries may crash while they are unloaded."""
    parser = argparse.ArgumentParser(prog="npu_worker")
    parser.add_argument("--devices", action="store_true")
    parser.add_argument("model", nargs="?")
    parser.add_argument("-o", dest="blob", type=Path)
    parser.add_argument("-g", dest="asked", action="append", default=[])
    parser.add_argument("properties", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    if options.devices:
        answer = list_devices()
    else:
        properties = dict(text.split("=", 1) for text in options.properties)
        answer = compile_model(options.model, properties, asked=options.asked, blob=options.blob)
    print("\n@@" + json.dumps(answer), flush=True)
    os._exit(0 if answer["ok"] else 1)


if __name__ == "__main__" and multiprocessing.current_process().name == "MainProcess":
    main(sys.argv[1:])
