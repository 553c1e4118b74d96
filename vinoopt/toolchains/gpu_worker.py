"""The child that lets Intel's OpenCL driver offer a GPU that is not here, and compiles one model for it.

Started by `gpu.py`, which sets the environment that the driver reads once per process. Nothing is inferred
and nothing is exported: in capture mode kernels never run, so results and blobs are garbage.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import time
from typing import Any

import openvino as ov

from vinoopt.errors import ToolchainMissing, ToolchainRefused
from vinoopt.toolchains.host import describe_layers, reason_of
from vinoopt.toolchains.process import serve

_CL_DEVICE_TYPE_GPU = 4
_CL_DRIVER_VERSION = 0x102D
_TEXT_BYTES = 256


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The device that the driver offers and, where the request names a model, what became of its layers."""
    core = ov.Core()
    device = _identity(core)
    if "model" not in request:
        return {"device": device}
    started = time.perf_counter()
    try:
        model = core.read_model(request["model"])
        is_quantized = any(op.get_type_name() == "FakeQuantize" for op in model.get_ordered_ops())
        # A cache made here holds weights that no kernel ever wrote: it must not meet a real device.
        compiled = core.compile_model(model, "GPU", {**request["properties"], "CACHE_DIR": ""})
    except RuntimeError as exc:
        raise ToolchainRefused(f"OpenVINO's GPU plugin refused the model: {reason_of(exc)}") from exc
    return {
        "device": device,
        "is_quantized": is_quantized,
        "seconds": time.perf_counter() - started,
        "layers": [layer.model_dump(mode="json") for layer in describe_layers(compiled)],
        "memory": {k: int(v) for k, v in core.get_property("GPU", "GPU_MEMORY_STATISTICS").items()},
    }


def _identity(core: ov.Core) -> dict[str, Any]:
    if "GPU" not in core.available_devices:
        raise ToolchainMissing("the driver offers no GPU for this family")
    capabilities = core.get_property("GPU", "OPTIMIZATION_CAPABILITIES")
    return {
        "name": core.get_property("GPU", "FULL_DEVICE_NAME"),
        "architecture": core.get_property("GPU", "DEVICE_ARCHITECTURE").rpartition("=v")[2],
        "execution_units": int(core.get_property("GPU", "GPU_EXECUTION_UNITS_COUNT")),
        "has_int8": "INT8" in capabilities,
        "has_xmx": "GPU_HW_MATMUL" in capabilities,
        "driver": _driver_version(),
        "openvino": ov.get_version().split("-")[0],
    }


def _driver_version() -> str:
    """`CL_DRIVER_VERSION` of the only GPU of the only platform; OpenVINO does not pass it on."""
    library = ctypes.CDLL(ctypes.util.find_library("OpenCL") or "libOpenCL.so.1")
    platform, device = ctypes.c_void_p(), ctypes.c_void_p()
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    handle, size = ctypes.c_void_p, ctypes.c_size_t
    library.clGetPlatformIDs.argtypes = [ctypes.c_uint, handle, handle]
    library.clGetDeviceIDs.argtypes = [handle, ctypes.c_uint64, ctypes.c_uint, handle, handle]
    library.clGetDeviceInfo.argtypes = [handle, ctypes.c_uint, size, handle, handle]
    failed = (
        library.clGetPlatformIDs(1, ctypes.byref(platform), None)
        or library.clGetDeviceIDs(platform, _CL_DEVICE_TYPE_GPU, 1, ctypes.byref(device), None)
        or library.clGetDeviceInfo(device, _CL_DRIVER_VERSION, _TEXT_BYTES, text, None)
    )
    if failed:
        raise ToolchainMissing(f"the OpenCL driver does not tell its version (OpenCL error {failed})")
    return text.value.decode("ascii", errors="replace")


if __name__ == "__main__":  # a process started by multiprocessing imports this module again
    serve(answer)
