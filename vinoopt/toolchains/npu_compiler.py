"""One call of Intel's NPU compiler in a child: what it printed, the schedule it left, the blob it wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vinoopt.errors import ToolchainCrashed, ToolchainError, ToolchainMissing, ToolchainRefused
from vinoopt.records import RuntimeProperties
from vinoopt.toolchains.npu_routes import Route, make_shadow_package, read_answer
from vinoopt.toolchains.process import STDOUT_FILE, ChildExit, child_folder, run_process

MODE_PARAMS = "NPU_COMPILATION_MODE_PARAMS"
WEIGHTS_SPARSITY = "enable-weights-sparsity"
TRACE_PARAMS = ("enable-schedule-trace=true", "dump-task-stats=true")
TRACE_FILE = "compileTimeScheduleTrace.json"
REQUIREMENTS = "RUNTIME_REQUIREMENTS"
ASKED = (REQUIREMENTS, "NPU_COMPILER_VERSION")
BLOB_FILE = "model.blob"
MEMORY_LIMIT_BYTES = 8 << 30
"""Twelve layers of BERT-base take 0.7 GB, so what reaches this has lost its way."""

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_MODEL_STAGES = frozenset({"properties", "read", "compile", "export"})
_NO_COMPILER = ("VCL compiler loading failed", "dlSym cannot locate", "cannot open shared object")
_LOADING = "Loading PLUGIN compiler"
_NOISE = re.compile(r"^(Exception from|Check '|\s*$)|vclAllocatedExecutableCreate|Compiler returned msg")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompilerOutput:
    """What one successful call gave."""

    compile_ms: float
    openvino: str
    values: Mapping[str, str]
    """The compiled model's own properties, as `RUNTIME_REQUIREMENTS`."""
    log: str
    """Everything the compiler printed, without colours."""
    schedule: Mapping[str, Any] | None
    """The Chrome trace of the schedule; None where the route has no cost model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompilerCall:
    """What is asked of the compiler."""

    model: Path
    platform: str
    properties: Mapping[str, str]
    timeout_s: float
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES


def call_compiler(route: Route, call: CompilerCall, *, blob: Path | None = None) -> CompilerOutput:
    """The compiler's output for an IR; the blob is written to `blob`.

    A run that ends with neither an answer nor an error message is repeated once: under wine that was seen in
    about one of two hundred runs. Raises `ToolchainRefused` with the compiler's own words,
    `ToolchainTimeout`, `ToolchainMissing`, `ToolchainCrashed`.
    """
    try:
        return _call_once(route, call, blob)
    except _SilentEndError:
        pass
    try:
        return _call_once(route, call, blob)
    except _SilentEndError as exc:
        raise ToolchainCrashed(f"{exc}, twice; that says nothing about the model") from exc


def mode_params(properties: RuntimeProperties) -> dict[str, str]:
    """The compiler's own options among the properties."""
    words = properties.as_dict().get(MODE_PARAMS, "").split()
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def with_mode_param(properties: RuntimeProperties, option: str, value: str) -> RuntimeProperties:
    """The properties with one of the compiler's own options set."""
    options = {**mode_params(properties), option: value}
    text = " ".join(f"{key}={options[key]}" for key in sorted(options))
    return RuntimeProperties.of({**properties.as_dict(), MODE_PARAMS: text})


class _SilentEndError(ToolchainError):
    """The child ended with neither an answer nor an error message."""


def _call_once(route: Route, call: CompilerCall, blob: Path | None) -> CompilerOutput:
    with child_folder() as folder:
        env = dict(route.env)
        if route.shadowed_library is not None:
            shadow = make_shadow_package(route.shadowed_library, folder)
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(shadow), env.get("PYTHONPATH"))))
        ended = run_process(
            [*route.command, *_arguments(route, call, folder)],
            folder=folder,
            env=env,
            timeout_s=call.timeout_s,
            memory_limit_bytes=call.memory_limit_bytes,
        )
        log = _ANSI.sub("", (folder / STDOUT_FILE).read_text(encoding="utf-8", errors="replace"))
        answer = _checked_answer(log, ended)
        output = CompilerOutput(
            compile_ms=float(answer["compile_ms"]),
            openvino=str(answer["openvino"]),
            values=answer["properties"],
            log=log,
            schedule=_read_schedule(folder / TRACE_FILE) if route.has_cost_model else None,
        )
        if blob is not None:
            _keep(folder / BLOB_FILE, blob)
        return output


def _keep(written: Path, blob: Path) -> None:
    if not written.is_file() or not written.stat().st_size:
        raise ToolchainCrashed("the NPU compiler reported success but wrote no blob")
    part = blob.with_name(blob.name + ".part")
    shutil.copyfile(written, part)
    part.replace(blob)


def _arguments(route: Route, call: CompilerCall, folder: Path) -> list[str]:
    """The harness's command line; the model comes by a plain name where the route cannot open every path."""
    model = str(call.model.resolve())
    if route.links_model:
        for suffix in (".xml", ".bin"):
            source = call.model.with_suffix(suffix).resolve()
            if source.exists():
                (folder / f"model{suffix}").symlink_to(source)
        model = "model.xml"
    properties = dict(call.properties)
    if route.has_cost_model:
        properties |= {"NPU_PLATFORM": call.platform, "NPU_COMPILER_TYPE": "PLUGIN", "LOG_LEVEL": "LOG_INFO"}
        properties[MODE_PARAMS] = " ".join([properties.get(MODE_PARAMS, ""), *TRACE_PARAMS]).strip()
    asked = [word for name in ASKED for word in ("-g", name)]
    return [model, "-o", BLOB_FILE, *asked, *(f"{key}={value}" for key, value in sorted(properties.items()))]


def _checked_answer(log: str, ended: ChildExit) -> Mapping[str, Any]:
    """The harness's answer where it is a success; raises what its failure means."""
    answer: Mapping[str, Any] | None = read_answer(log)
    complaints = error_lines(log)
    if answer is None and log.rstrip().endswith(_LOADING):
        # The plugin dies here, at this log level, where it cannot open the library or finds another one.
        raise ToolchainMissing(
            f"the NPU compiler's library could not be loaded ({ended.cause}); it must be that of the installed "
            "OpenVINO release"
        )
    if answer is None and not complaints:
        raise _SilentEndError(
            f"the NPU compiler ended with {ended.cause} and no answer. {_last_line(ended.stderr)}"
        )
    if answer is None and ended.is_crash:
        raise ToolchainCrashed(
            f"the NPU compiler died with {ended.cause} after complaining: {'; '.join(complaints)}; whether it would "
            "refuse the model is not known"
        )
    if answer is None:
        raise ToolchainRefused(
            f"the NPU compiler ended with {ended.cause} after complaining: {'; '.join(complaints)}"
        )
    if answer["ok"]:
        return answer
    reason = refusal_reason(str(answer["message"]), complaints)
    if any(mark in str(answer["message"]) for mark in _NO_COMPILER):
        raise ToolchainMissing(f"the NPU compiler's library cannot be used: {reason}")
    if answer["stage"] not in _MODEL_STAGES:
        raise ToolchainCrashed(f"the NPU compiler could not be started ({answer['stage']}): {reason}")
    raise ToolchainRefused(f"the NPU compiler refused at stage {answer['stage']}: {reason}")


def error_lines(log: str) -> list[str]:
    """The texts of `[ERROR]` lines, each once, without time and channel."""
    found = re.findall(r"^\[ERROR\](?:\s+[\d:.]+)?(?:\s+\[[^\]]*\])?\s*(.+)$", log, flags=re.MULTILINE)
    return list(dict.fromkeys(text.strip()[:400] for text in found))[:8]


def refusal_reason(message: str, complaints: Sequence[str]) -> str:
    """What an OpenVINO error says, without its stack of source places; `[ERROR]` lines where it is bare."""
    telling = [line.strip() for line in message.splitlines() if not _NOISE.search(line)]
    parts = [line for line in telling if line != "Compilation failed"]
    return "; ".join(dict.fromkeys([*parts, *complaints])) or message.strip() or "no reason given"


def _read_schedule(path: Path) -> Mapping[str, Any]:
    try:
        schedule = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as exc:
        raise ToolchainCrashed(f"the NPU compiler succeeded but left no readable {path.name}: {exc}") from exc
    if not isinstance(schedule, dict):
        raise ToolchainCrashed(f"the NPU compiler left a {path.name} that is not an object")
    return schedule


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "It printed nothing."
