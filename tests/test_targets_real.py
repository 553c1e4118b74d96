"""Real models on targets that are not here: three NPU platforms, three generations of graphics, three CPUs.

One run of the table's script, whose lines are then judged; what lacks its toolchain here is skipped, by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vinoopt.hardware.profile import resolve
from vinoopt.records import Device, Target
from vinoopt.toolchains.cpu_isa import CpuIsaToolchain
from vinoopt.toolchains.gpu import GpuToolchain
from vinoopt.toolchains.npu import NpuToolchain

pytestmark = [pytest.mark.slow, pytest.mark.offline]

ROOT = Path(__file__).resolve().parent.parent
RESNET, SQUEEZENET, UNREADABLE = "cifar_resnet20", "squeezenet1.0_fp32", "odd_noisy_relu_custom_op"
NPUS = ("meteor-lake-h:NPU", "lunar-lake:NPU", "panther-lake-h:NPU")
WITHOUT_INT8 = ("skylake:GPU", "ice-lake:GPU")
CPUS = ("skylake:CPU", "alder-lake:CPU", "ice-lake:CPU")
PROBES: dict[Device, Any] = {Device.CPU: CpuIsaToolchain, Device.GPU: GpuToolchain, Device.NPU: NpuToolchain}


def table(shared: Path, output: Path, *models: str) -> list[dict[str, Any]]:
    words = [word for model in models for word in ("--model", model)]
    script = ROOT / "scripts" / "table_targets.py"
    done = subprocess.run(
        [sys.executable, script, shared / "models", "--output", output, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.fspath(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def lines(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    output = tmp_path_factory.mktemp("table") / "lines.jsonl"
    made = table(shared, output, RESNET, SQUEEZENET, UNREADABLE)
    return {(line["model"], line["target"]): line for line in made}


def line_of(lines: dict[tuple[str, str], dict[str, Any]], model: str, target: str) -> dict[str, Any]:
    spec = resolve(Target.parse(target))
    found = PROBES[spec.kind]().probe(spec)
    if not found.ok:
        pytest.skip(f"{target}: {found.reason}; {found.fix}")
    return lines[model, target]


@pytest.mark.parametrize("model", [RESNET, SQUEEZENET])
@pytest.mark.parametrize("target", NPUS)
def test_npu_platforms_take_int8_and_model_it_faster(lines: Any, model: str, target: str) -> None:
    line = line_of(lines, model, target)
    assert (line["verdict"], line["evidence"]) == ("compiled", "modelled")
    assert 0 < line["int8_ms"] < line["float_ms"]
    assert line["mac_layers_int8"] == line["mac_layers"] >= 20
    assert line["on_shave"] < 0.1 * line["layers"]


@pytest.mark.parametrize("model", [RESNET, SQUEEZENET])
@pytest.mark.parametrize("target", [*WITHOUT_INT8, "alder-lake:GPU"])
def test_gpu_generations_run_int8_where_they_have_it(lines: Any, model: str, target: str) -> None:
    line = line_of(lines, model, target)
    assert (line["verdict"], line["evidence"], line["on_reference"]) == ("compiled", "modelled", 0)
    if target in WITHOUT_INT8:
        assert line["mac_layers_int8"] == 0
        assert "no INT8 arithmetic" in line["why"]
    else:
        assert line["mac_layers_int8"] == line["mac_layers"] >= 20
        assert line["int8_ms"] < line["float_ms"]


@pytest.mark.parametrize("model", [RESNET, SQUEEZENET])
@pytest.mark.parametrize("target", CPUS)
def test_instruction_sets_run_every_product_in_int8(lines: Any, model: str, target: str) -> None:
    line = line_of(lines, model, target)
    assert (line["verdict"], line["evidence"]) == ("compiled", "emulated")
    assert line["mac_layers_int8"] == line["mac_layers"] >= 20
    assert line["int8_ms"] < line["float_ms"]


def test_file_that_openvino_does_not_read_has_one_line(lines: Any) -> None:
    found = [line for (model, _), line in lines.items() if model == UNREADABLE]
    assert [(line["target"], line["verdict"]) for line in found] == [("every", "not read")]
    assert "NoisyRelu" in found[0]["why"]


def test_lines_that_are_there_are_not_made_again(shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    (first,) = table(shared, output, UNREADABLE)
    assert table(shared, output, UNREADABLE) == [first]
