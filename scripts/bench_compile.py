"""Time and peak memory of `vinoopt.compile` itself, stage by stage, as models and calibration data grow.

    python scripts/bench_compile.py --output compile.jsonl
    python scripts/bench_compile.py --quick --effort fast --device GPU

Residual networks with random weights are generated at several depths, widths and calibration sample counts, one of
the three growing at a time, and compiled for a device of this machine with no labels and an empty cache. Every run
has a process of its own, so that its peak memory is its own. Stages are those of the events that `compile` sends; the
search is cut after its last trial, where the choice on the test part and the final measurements begin. The peak is
the process's high-water mark when the stage was left for the last time, so the stage at which it rises is the one
that needs the memory. One JSON line per run goes to the output and to the terminal, a table at the end; what the
output already holds is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Nothing heavy up here: on Linux a child's high-water mark begins with its parent's size.

SIDE = 32
DATA_SAMPLES = 400
"""For search and test, whatever the calibration part is."""
DEPTHS, WIDTHS, SAMPLES = (1, 2, 4), (16, 32, 64), (100, 300, 900)
BASE = (2, 32, 300)
QUICK = (1, 16, 100)
LARGE = (8, 96, 300)
"""The size of ResNet-50: 49 convolutions, 28 million parameters, 4.1 billion multiplications per image."""


@dataclass(frozen=True)
class Case:
    """A generated network and how much data calibrates it."""

    depth: int
    """Residual blocks in each of three stages."""
    width: int
    """Channels of the first stage; each following one has twice as many."""
    samples: int


def cases(options: argparse.Namespace) -> list[Case]:
    """The base, and one of its three numbers changed at a time; or a single one."""
    if options.quick or options.large:
        return [Case(*(QUICK if options.quick else LARGE))]
    depth, width, samples = BASE
    found = [
        *(Case(each, width, samples) for each in DEPTHS),
        *(Case(depth, each, samples) for each in WIDTHS),
        *(Case(depth, width, each) for each in SAMPLES),
    ]
    return list(dict.fromkeys(found))


# --------------------------------------------------------------------------- in the child


def write_network(case: Case, path: Path) -> int:
    """Write the residual network as ONNX; its number of parameters."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    constants: list[Any] = []

    def convolution(x: str, inputs: int, outputs: int, kernel: int, stride: int) -> str:
        name = f"conv{len(nodes)}"
        scale = (2 / (inputs * kernel**2)) ** 0.5
        weight = rng.standard_normal((outputs, inputs, kernel, kernel), np.float32) * np.float32(scale)
        constants.append(numpy_helper.from_array(weight, f"{name}.weight"))
        pads, strides = [kernel // 2] * 4, [stride] * 2
        nodes.append(
            helper.make_node("Conv", [x, f"{name}.weight"], [name], name=name, pads=pads, strides=strides)
        )
        return name

    def then(operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}{len(nodes)}"
        nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    x, channels = then("Relu", convolution("x", 3, case.width, 3, 1)), case.width
    for stage in range(3):
        for block in range(case.depth):
            outputs, stride = case.width << stage, 2 if stage and not block else 1
            inner = then("Relu", convolution(x, channels, outputs, 3, stride))
            shortcut = convolution(x, channels, outputs, 1, stride) if outputs != channels else x
            x = then("Relu", then("Add", convolution(inner, outputs, outputs, 3, 1), shortcut))
            channels = outputs
    flat = then("Flatten", then("GlobalAveragePool", x))
    constants.append(numpy_helper.from_array(rng.standard_normal((channels, 10), np.float32), "classifier"))
    nodes.append(helper.make_node("MatMul", [flat, "classifier"], ["logits"], name="matmul"))
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return sum(int(np.prod(constant.dims)) for constant in constants)


@dataclass(frozen=True)
class Moment:
    """When a stage began, and the high-water mark of memory until then."""

    stage: str
    seconds: float
    peak_bytes: int


def stages_of(moments: list[Moment]) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and high-water mark per stage; what follows the last trial until the bundle is written is `choice`."""
    last_trial = max((n for n, moment in enumerate(moments) if moment.stage == "trial"), default=len(moments))
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for number, (moment, after) in enumerate(itertools.pairwise(moments)):
        stage = "search" if moment.stage == "trial" else moment.stage
        stage = "choice" if stage == "search" and number >= last_trial else stage
        seconds[stage] = seconds.get(stage, 0.0) + after.seconds - moment.seconds
        peaks[stage] = after.peak_bytes
    return seconds, peaks


def run_case(case: Case, *, effort: str, device: str, folder: Path) -> dict[str, Any]:
    """One compilation: seconds and peak per stage, and what came out."""
    import numpy as np

    import vinoopt
    from vinoopt.bench.conditions import require_device
    from vinoopt.bench.memory import peak_bytes
    from vinoopt.records import AccuracyBudget

    kind = require_device(device)
    path = folder / "residual.onnx"
    parameters = write_network(case, path)
    rng = np.random.default_rng(1)
    calibration, data = (
        rng.standard_normal((count, 3, SIDE, SIDE), np.float32) for count in (case.samples, DATA_SAMPLES)
    )
    compile_model = vinoopt.compile  # imports all that it needs
    before, moments = peak_bytes(), []

    def note(stage: str) -> None:
        moments.append(Moment(stage, time.monotonic(), peak_bytes()))

    note("check")
    bundle = compile_model(
        path,
        targets=(f"host:{kind}",),
        data=data,
        calibration_data=calibration,
        budget=AccuracyBudget(max_drop=0.05),
        subset_size=case.samples,
        effort=effort,
        output=folder / "build",
        on_event=lambda event: note(event.stage),
    )
    note("end")
    stage_seconds, stage_peaks = stages_of(moments)
    result = bundle.result(str(kind))
    return {
        **asdict(case),
        "effort": effort,
        "device": device,
        "parameters": parameters,
        "trials": bundle.manifest.trials,
        "plan": result.plan.title,
        "seconds": bundle.manifest.seconds,
        "stage_seconds": stage_seconds,
        "stage_peak_bytes": stage_peaks,
        "before_bytes": before,
        "peak_bytes": peak_bytes(),
        "host": bundle.manifest.host.cpu,
        "versions": bundle.manifest.host.versions,
    }


def child(text: str, effort: str, device: str) -> int:
    from vinoopt.errors import VinooptError

    with tempfile.TemporaryDirectory() as folder:
        os.environ["VINOOPT_CACHE_DIR"] = str(Path(folder) / "cache")
        try:
            row = run_case(Case(**json.loads(text)), effort=effort, device=device, folder=Path(folder))
        except VinooptError as exc:
            print(f"{text}: {type(exc).__name__}: {exc}", file=sys.stderr)
            return exc.exit_code
    print(json.dumps(row))
    return 0


# --------------------------------------------------------------------------- in the parent


def rows_of(wanted: list[Case], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in wanted:
        text = json.dumps(asdict(case))
        print(f"{text} ...", file=sys.stderr, flush=True)
        words = [sys.executable, str(Path(__file__).resolve()), "--child", text]
        words += ["--effort", options.effort, "--device", options.device]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == 2:  # it cannot be asked for here, and the child said why
            raise SystemExit(2)
        if done.returncode != 0:
            print(f"{text}: ended with {done.returncode}", file=sys.stderr)
            yield {
                **asdict(case), "effort": options.effort, "device": options.device, "failed": done.returncode
            }  # fmt: skip
        else:
            yield json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds and MB of each stage, one line per run."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row.get("stage_seconds", {})))
    head = ["depth", "width", "samples", "params", "trials", "seconds", "peak MB", *stages]
    lines = [head]
    for row in rows:
        line = [str(row[key]) for key in ("depth", "width", "samples")]
        if "failed" in row:
            lines.append([*line, "failed", *[""] * (len(head) - 4)])
            continue
        line += [str(row["parameters"]), str(row["trials"]), f"{row['seconds']:.1f}"]
        line.append(f"{row['peak_bytes'] / 1e6:.0f}")
        for stage in stages:
            seconds, peak = row["stage_seconds"].get(stage), row["stage_peak_bytes"].get(stage)
            line.append("-" if seconds is None else f"{seconds:.1f} s, {peak / 1e6:.0f} MB")
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest network only")
    parser.add_argument("--large", action="store_true", help="one network of the size of ResNet-50 only")
    parser.add_argument("--effort", default="fast", choices=("fast", "balanced", "thorough"))
    parser.add_argument("--device", default="CPU", help="as OpenVINO lists it; default: CPU")
    parser.add_argument("--output", type=Path, default=Path("compile.jsonl"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child, options.effort, options.device)
    text = options.output.read_text(encoding="utf-8") if options.output.is_file() else ""
    held = [row for row in map(json.loads, text.splitlines()) if "failed" not in row]
    rows = [row for row in held if row.get("device", "CPU") == options.device]
    known = {Case(row["depth"], row["width"], row["samples"]) for row in rows if row["effort"] == options.effort}
    with options.output.open("a", encoding="utf-8") as stream:
        for row in rows_of([case for case in cases(options) if case not in known], options):
            line = json.dumps(row)
            stream.write(line + "\n")
            stream.flush()
            print(line, flush=True)
            rows.append(row)
    print(table(rows))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
