"""Measurement jobs here and on real workers, one of which dies in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import openvino as ov
import openvino.opset13 as ops
import pytest

import vinoopt
from vinoopt.accuracy.datasets import Dataset
from vinoopt.bench import Contestant, Engine, MeasureConfig
from vinoopt.cli.main import main
from vinoopt.demo import demo_files
from vinoopt.errors import DeviceError, InputError, ToolchainMissing
from vinoopt.fleet import FleetReport, Job, Line, announcement, connected, run
from vinoopt.frontend.preprocess import read_preprocess
from vinoopt.lab import Lab
from vinoopt.records import Device, Event, Evidence, Target
from vinoopt.tuning import TuneConfig, TuneTask
from vinoopt.verification import CheckState, verify

SHORT = MeasureConfig(rounds=5, min_round_ms=0.5, warmup_ms=1)
SAMPLE = {"x": np.ones((1, 8), np.float32)}


def network(scale: float = 1.0) -> ov.Model:
    x = ops.parameter([1, 8], np.float32, name="x")
    x.output(0).set_names({"x"})
    return ov.Model([ops.multiply(x, np.float32(scale), name="scaled")], [x], "scale")


def job(name: str, *, profile: str | None = None, device: str = "CPU", **changes: Any) -> Job:
    contestants = tuple(
        Contestant(name=n, model=network(s), device=device) for n, s in (("a", 2.0), ("b", 3.0))
    )
    return Job(**{
        "name": name, "contestants": contestants, "samples": (SAMPLE,), "config": SHORT, "profile": profile,
        **changes,
    })  # fmt: skip


# --------------------------------------------------------------------------- here


def test_without_a_scheduler_all_is_measured_here_or_told() -> None:
    told: list[str] = []
    jobs = [
        job("good"),
        job("elsewhere", profile="lunar-lake-nobody-has"),
        job("npu", device="NPU.7"),
        job("misfit", samples=({"y": SAMPLE["x"]},)),
    ]
    report = run(jobs, on_outcome=lambda outcome: told.append(outcome.job))
    assert told == ["good", "elsewhere", "npu", "misfit"]
    (good,) = report.measured
    assert [m.name for m in good.result.measurements] == ["a", "b"]
    assert good.result.compare("a", "b").speedup > 0
    assert (good.job, good.worker) == ("good", "here")
    assert good.host.devices["CPU"] == good.host.cpu
    reasons = {each.job: each.reason for each in report.unmeasured}
    assert "lacks lunar-lake-nobody-has" in reasons["elsewhere"]
    assert "lacks NPU" in reasons["npu"]
    assert 'the samples lack input "x"' in reasons["misfit"]


def test_an_interrupt_gives_up_the_rest() -> None:
    def interrupt(outcome: object) -> None:
        raise KeyboardInterrupt

    def once() -> Iterator[Callable[[object], None]]:
        yield interrupt
        while True:
            yield lambda outcome: None

    listeners = once()
    report = run([job("first"), job("second")], on_outcome=lambda outcome: next(listeners)(outcome))
    assert [each.job for each in report.measured] == ["first"]
    assert [(each.job, each.reason) for each in report.unmeasured] == [("second", "interrupted")]


def test_jobs_need_names_of_their_own() -> None:
    with pytest.raises(InputError, match="names of their own: same, same"):
        run([job("same"), job("same")])


@pytest.mark.parametrize(
    ("device", "needs"),
    [("CPU", ("CPU",)), ("GPU.1", ("CPU", "GPU")), ("AUTO:NPU,GPU", ("CPU", "GPU", "NPU"))],
)
def test_a_job_needs_its_devices_and_the_machine_for_itself(device: str, needs: tuple[str, ...]) -> None:
    assert job("x", device=device).needs == needs
    assert job("x", device=device, profile="lab").needs == (*needs, "lab")


def test_this_machine_announces_its_devices() -> None:
    assert announcement()[0] == "CPU"


# --------------------------------------------------------------------------- on workers


@dataclass(frozen=True)
class Fleet:
    """A scheduler on the loopback; its processes end with the test."""

    address: str
    folder: Path
    processes: ExitStack

    def worker(self, name: str, resources: str) -> subprocess.Popen[bytes]:
        words = [self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard", "--name", name]
        words += ["--host", "127.0.0.1", "--resources", resources, "--local-directory", str(self.folder)]
        return start(self.processes, "dask_worker", *words, folder=self.folder)

    def wait_for(self, workers: int) -> None:
        with connected(self.address) as client:
            client.wait_for_workers(workers, timeout=60)


def start(processes: ExitStack, program: str, *words: str, folder: Path) -> subprocess.Popen[bytes]:
    log = processes.enter_context((folder / f"{program}-{time.monotonic_ns()}.log").open("wb"))
    process = subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.{program}", *words], stdout=log, stderr=log
    )

    def end() -> None:
        process.kill()
        process.wait()

    processes.callback(end)
    return process


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    pytest.importorskip("distributed", reason='needs pip install "vinoopt[fleet]"')
    file = tmp_path / "scheduler.json"
    with ExitStack() as processes:
        words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
        start(processes, "dask_scheduler", *words, folder=tmp_path)
        until(lambda: file.is_file() and file.stat().st_size > 0)
        yield Fleet(json.loads(file.read_text())["address"], tmp_path, processes)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def test_a_lost_worker_is_replaced_and_what_nobody_can_measure_is_told(fleet: Fleet) -> None:
    from distributed import Client

    long = job("long", profile="lab", config=MeasureConfig(seconds=2.0, min_round_ms=5, warmup_ms=1))
    reports: list[FleetReport] = []
    jobs = [long, job("npu", device="NPU"), job("misfit", samples=({"y": SAMPLE["x"]},))]
    workers = [fleet.worker(name, "CPU=1,lab=1") for name in ("first", "second")]
    runner = threading.Thread(
        target=lambda: reports.append(run(jobs, scheduler=fleet.address, patience_s=3.0))
    )
    with Client(fleet.address, set_as_default=False) as watcher:
        watcher.wait_for_workers(2, timeout=60)
        processes = watcher.run(os.getpid)
        runner.start()
        until(lambda: busy_with(watcher, "long") is not None)
        lost = busy_with(watcher, "long")
        time.sleep(0.5)  # into the measurement
        next(each for each in workers if each.pid == processes[lost]).kill()
        runner.join(90)
    (report,) = reports
    (measured,) = report.measured
    assert measured.job == "long"
    assert measured.worker not in ("here", lost)
    assert measured.host.versions["openvino"] == metadata.version("openvino")
    reasons = {each.job: each.reason for each in report.unmeasured}
    assert reasons["npu"] == "for 3 s no worker announced CPU, NPU"
    assert 'the samples lack input "x"' in reasons["misfit"]


def busy_with(client: Any, name: str) -> str | None:
    """The address of the worker that the job was given to."""
    return next(
        (worker for worker, keys in client.processing().items() if any(name in str(key) for key in keys)),
        None,
    )


def test_files_travel_and_the_command_line_tells_the_host(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ov.save_model(network(), tmp_path / "net.xml", compress_to_fp16=False)
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[1,8] x) => (float[1,8] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "relu.onnx")
    fleet.worker("only", "CPU=1,lab=1")
    contestants = (
        Contestant(name="ir", model=tmp_path / "net.xml"),
        Contestant(name="onnx", model=tmp_path / "relu.onnx", engine=Engine.ONNXRUNTIME),
    )
    report = run([job("files", contestants=contestants)], scheduler=fleet.address)
    assert report.unmeasured == ()
    assert [m.name for m in report.measured[0].result.measurements] == ["ir", "onnx"]

    words = ["bench", str(tmp_path / "net.xml"), "--against", str(tmp_path / "relu.onnx"), "-t", "0.2"]
    assert main([*words, "--scheduler", fleet.address, "--on", "lab", "--json"]) == 0
    text = capsys.readouterr().out
    told = json.loads(text)
    (one,) = told["measured"]
    assert one["job"] == "net on lab"
    assert one["worker"].startswith("tcp://127.0.0.1")
    assert one["comparisons"][0]["candidate"] == "net"
    assert told["unmeasured"] == []
    assert one["inputs"] == "random"
    files = [tmp_path / name for name in ("old.json", "new.json")]
    for file in files:
        file.write_text(text)
    assert main(["compare", *map(str, files), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["through"] == ["relu"]
    assert not compared["comparison"]["is_significant"]
    files[0].write_text(json.dumps({"measured": [one, one], "unmeasured": []}))
    assert main(["compare", *map(str, files)]) == 2
    assert "holds 2 runs" in capsys.readouterr().err


def test_what_cannot_be_sent_and_who_does_not_answer() -> None:
    pytest.importorskip("distributed", reason='needs pip install "vinoopt[fleet]"')
    with pytest.raises(InputError, match="does not answer; start one with `dask scheduler`"):
        run([job("x")], scheduler="nonsense://127.0.0.1:1")


def test_a_place_without_a_scheduler_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "net.xml", "--on", "lab"]) == 2
    assert "--scheduler" in capsys.readouterr().err


# --------------------------------------------------------------------------- the search


PRODUCT = """
schema = 1
family = "lab"
title = "The box in the lab"
sources = ["the test"]

[devices.CPU]
name = "CPU of the lab"
architecture = "x86-64"
precisions = ["f32"]
channel_multiple = 8
"""


def test_the_search_measures_on_workers_and_goes_on_where_one_is_lost(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VINOOPT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "lab-box.toml").write_text(PRODUCT)
    workers = [fleet.worker(name, "CPU=1,lab-box=1") for name in ("first", "second")]
    fleet.wait_for(2)
    files, trials = demo_files(), 0

    def lose_one(event: Event) -> None:
        nonlocal trials
        trials += event.stage == "trial"
        if trials == 2:
            workers[0].kill()

    bundle = vinoopt.compile(
        files.model,
        targets=[f"{tmp_path}/lab-box.toml:CPU"],
        data=str(files.data),
        labels="labels",
        preprocess=read_preprocess(files.preprocess),
        effort="fast",
        time_limit_s=15.0,
        scheduler=fleet.address,
        output=tmp_path / "digits.vinoopt",
        on_event=lose_one,
    )
    assert trials >= 2
    assert workers[0].wait(10) != 0
    (result,) = bundle.manifest.targets
    assert result.budget_met
    assert {each.evidence for each in result.measurements} == {Evidence.MEASURED}
    assert all(" at tcp://127.0.0.1" in each.source for each in result.measurements)
    assert result.host is not None
    assert result.host.versions["openvino"] == metadata.version("openvino")
    assert any("a worker that announces lab-box" in reason for reason in result.reasons)
    assert CheckState.FAILED not in {check.state for check in verify(bundle, seconds=0).checks}


def test_outputs_layers_and_settings_of_a_worker_are_those_of_its_device(fleet: Fleet, tmp_path: Path) -> None:
    """Which is this one: the same calls here must give the same."""
    fleet.worker("only", "CPU=1,lab-box=1")
    (tmp_path / "lab-box.toml").write_text(PRODUCT)
    target = Target.parse(f"{tmp_path}/lab-box.toml:CPU")
    model, samples = network(3.0), [{"x": np.full((1, 8), number, np.float32)} for number in range(12)]
    data = Dataset(reader=samples)
    with connected(fleet.address) as client:
        lab = Lab(line=Line(client, patience_s=3.0), target=target)
        for part in (data, data.subset(range(3)), data):  # the worker keeps what it was sent
            found = lab.predict(model, part, properties={"INFERENCE_PRECISION_HINT": "f32"}, device=Device.CPU)
            assert [call["y"].max() for call in map(named("y"), found)] == [3.0 * i for i in range(len(part))]
        times = lab.layer_times(model, Device.CPU, {}, samples, blocks=["scaled"])
        assert set(times) == {"scaled"}
        result = lab.tune(TuneTask(model=model, samples=samples), TuneConfig(seconds=4.0))
        assert result.trials
        with pytest.raises(DeviceError, match="no_such_property"):
            lab.predict(model, data, properties={"no_such_property": "1"}, device=Device.CPU)
        elsewhere = Lab(line=Line(client, patience_s=0.5), target=Target(profile="nobody", device=Device.NPU))
        with pytest.raises(ToolchainMissing, match=r"for 0.5 s no worker announced CPU, NPU, nobody"):
            elsewhere.measure([Contestant(name="a", model=model)], samples, SHORT)


def named(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The only output under this name, whatever the model calls it."""
    return lambda call: {name: next(iter(call.values()))}
