"""Devices of this machine, as far as a CPU can stand for them: the real child on the CPU, the rest by fakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from vinoopt.errors import ShapeError, ToolchainCrashed, ToolchainRefused, ToolchainTimeout
from vinoopt.records import (
    Build,
    Device,
    DeviceSpec,
    Diagnostic,
    Evidence,
    Precision,
    RuntimeProperties,
    Target,
)
from vinoopt.toolchains import npu_worker
from vinoopt.toolchains.calls import read_calls, write_calls
from vinoopt.toolchains.host import RUNTIME_REQUIREMENTS, HostToolchain
from vinoopt.toolchains.process import ChildReply, run_child
from vinoopt.yardsticks import Here, HostYardstick

F16 = RuntimeProperties.of({"INFERENCE_PRECISION_HINT": "f16"})
CALL = {"x": np.random.default_rng(0).random((1, 16, 4, 4), dtype=np.float32)}


def spec(kind: Device, architecture: str = "4000") -> DeviceSpec:
    return DeviceSpec(
        kind=kind, name="ours", architecture=architecture, precisions=(Precision.F16,), channel_multiple=16
    )


def network(*, shape: tuple[int, ...] = (1, 16, 4, 4), padded: bool = False) -> ov.Model:
    data = ops.parameter(list(shape), np.float32, name="x")
    data.output(0).set_names({"x"})
    node: Any = ops.pad(data, [0, 0, 0, 0], [0, 16, 0, 0], "constant", np.float32(0)) if padded else data
    depth = 32 if padded else 16
    kernel = np.random.default_rng(1).random((8, depth, 1, 1), dtype=np.float32)
    node = ops.convolution(node, ops.constant(kernel), [1, 1], [0, 0], [0, 0], [1, 1], name="conv")
    node.set_friendly_name("conv")
    return ov.Model([ops.result(node)], [data], "network")


def save(model: ov.Model, folder: Path) -> Path:
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return folder / "model.xml"


class OnCpu:
    """The real child, which is told CPU where another device was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, command: str, *, request: dict[str, Any], **options: Any) -> ChildReply:
        self.asked.append(request["device"])
        return run_child(command, request={**request, "device": "CPU"}, **options)


def yardstick(kind: Device, run: Any) -> HostYardstick:
    target = Target(profile="host", device=kind)
    toolchain = HostToolchain(run=run)
    return HostYardstick(
        target=target, spec=spec(kind), reference=network(), samples=[CALL] * 6, place=Here(toolchain=toolchain)
    )


@pytest.mark.parametrize("kind", [Device.GPU, Device.NPU])
def test_blob_layers_and_outputs_come_from_a_child(kind: Device, tmp_path: Path) -> None:
    run, ir, blob = OnCpu(), save(network(), tmp_path), tmp_path / "model.blob"
    write_calls(tmp_path / "calls.npz", [CALL, CALL])
    build = HostToolchain(run=run).compile(
        ir,
        spec(kind),
        properties=F16,
        output=blob,
        timeout_s=60,
        calls=tmp_path / "calls.npz",
        outputs=tmp_path / "outputs.npz",
    )
    assert run.asked == [kind.value]
    assert (build.evidence, build.blob, build.properties) == (Evidence.COMPILED, "model.blob", F16)
    assert "Convolution" in {layer.type for layer in build.layers}
    assert RUNTIME_REQUIREMENTS in build.details
    imported = ov.Core().import_model(blob.read_bytes(), "CPU")
    outputs = list(read_calls(tmp_path / "outputs.npz"))
    assert len(outputs) == 2
    np.testing.assert_array_equal(outputs[0]["0"], imported(CALL)[0])


def test_cpu_compiles_here_and_leaves_no_blob(tmp_path: Path) -> None:
    def never(*words: Any, **options: Any) -> ChildReply:
        raise AssertionError("a child was started")

    ir = save(network(), tmp_path)
    build = HostToolchain(run=never).compile(
        ir, spec(Device.CPU), properties=RuntimeProperties(), output=tmp_path / "b", timeout_s=1
    )
    assert build.blob is None
    assert not (tmp_path / "b").exists()


def test_what_the_plugin_refuses_and_where_it_hangs_is_told_by_name(tmp_path: Path) -> None:
    ir = save(network(), tmp_path)
    odd = RuntimeProperties.of({"NO_SUCH_PROPERTY": "1"})
    with pytest.raises(ToolchainRefused, match="plugin refused the model"):
        HostToolchain(run=OnCpu()).compile(
            ir, spec(Device.GPU), properties=odd, output=tmp_path / "b", timeout_s=60
        )
    with pytest.raises(ToolchainTimeout):
        HostToolchain(run=OnCpu()).compile(
            ir, spec(Device.GPU), properties=F16, output=tmp_path / "b", timeout_s=0.01
        )


def test_npu_of_this_machine_is_asked_only_what_its_compiler_takes(tmp_path: Path) -> None:
    run = OnCpu()
    toolchain = HostToolchain(run=run)
    options: dict[str, Any] = {"properties": RuntimeProperties(), "output": tmp_path / "b", "timeout_s": 60}
    with pytest.raises(ShapeError, match="is open in dimension 0"):
        toolchain.compile(save(network(shape=(-1, 16, 4, 4)), tmp_path), spec(Device.NPU), **options)
    values = ops.parameter([4, 16], np.float32, name="x")
    tangent = ov.Model([ops.result(ops.tan(values))], [values], "tan")
    with pytest.raises(ToolchainRefused, match="NPU 4000 has no Tan"):
        toolchain.compile(save(tangent, tmp_path), spec(Device.NPU), **options)
    assert run.asked == []
    assert toolchain.compile(save(tangent, tmp_path), spec(Device.NPU, "5010"), **options).blob
    ir = save(network(padded=True), tmp_path)
    build = toolchain.compile(ir, spec(Device.NPU), **options)
    assert [each.code for each in build.diagnostics] == ["NPU_REWRITTEN"]
    assert "Pad" not in {op.get_type_name() for op in ov.Core().read_model(ir).get_ops()}


def test_candidates_are_run_in_the_form_that_the_npu_takes() -> None:
    model = network(padded=True)
    ready = yardstick(Device.NPU, OnCpu()).ready(model)
    kinds = [{op.get_type_name() for op in each.get_ops()} for each in (ready, model)]
    assert ["Pad" in each for each in kinds] == [False, True]
    assert yardstick(Device.GPU, OnCpu()).ready(model) is model


# --------------------------------------------------------------------------- parity on real inputs


def parity_of(build: Build) -> Diagnostic:
    (told,) = [each for each in build.diagnostics if each.code.startswith("HOST_")]
    return told


@pytest.mark.parametrize("kind", [Device.GPU, Device.NPU])
def test_outputs_are_held_against_those_of_the_cpu(kind: Device, tmp_path: Path) -> None:
    build = yardstick(kind, OnCpu()).compile(save(network(), tmp_path), F16, tmp_path / "model.blob")
    told = parity_of(build)
    assert (told.code, told.severity) == ("HOST_PARITY", "info")
    assert "on 4 real inputs" in told.message
    assert build.target == Target(profile="host", device=kind)


def test_device_that_computes_something_else_is_a_warning(tmp_path: Path) -> None:
    def wrong(command: str, *, collect: dict[str, Path], **options: Any) -> ChildReply:
        reply = OnCpu()(command, collect=collect, **options)
        outputs = collect["outputs.npz"]
        twice = [{name: 2 * value for name, value in call.items()} for call in read_calls(outputs)]
        write_calls(outputs, twice)
        return reply

    build = yardstick(Device.GPU, wrong).compile(save(network(), tmp_path), F16, tmp_path / "model.blob")
    told = parity_of(build)
    assert (told.code, told.severity) == ("HOST_DEPARTS", "warning")
    assert "by 1 of their range" in told.message


def test_driver_that_dies_costs_the_blob_alone(tmp_path: Path) -> None:
    def dies(*words: Any, **options: Any) -> ChildReply:
        raise ToolchainCrashed("ended with SIGSEGV")

    build = yardstick(Device.GPU, dies).compile(save(network(), tmp_path), F16, tmp_path / "model.blob")
    assert (build.evidence, build.blob) == (Evidence.NOT_CHECKED, None)
    assert "SIGSEGV" in parity_of(build).message


def test_harness_in_python_leaves_a_blob_that_can_be_imported(tmp_path: Path) -> None:
    ir, blob = save(network(), tmp_path), tmp_path / "model.blob"
    answer = npu_worker.compile_model(str(ir), {}, asked=["NETWORK_NAME"], blob=blob, device="CPU")
    assert answer["ok"]
    assert answer["properties"] == {"NETWORK_NAME": "network"}
    assert ov.Core().import_model(blob.read_bytes(), "CPU")(CALL)
