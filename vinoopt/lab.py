"""A worker of a fleet as the place where a target's candidates are measured and run.

`vinoopt compile --scheduler tcp://lab:8786 --target lunar-lake:NPU` sends every candidate to a worker that announces
`NPU` and `lunar-lake`: its latency, its layers' times, its outputs on the data, its blob and its runtime properties
are then those of the product. Pruning, quantization, training and the float reference are computed here.
"""

from __future__ import annotations

import io
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions
from vinoopt.bench import BenchResult, Contestant, MeasureConfig
from vinoopt.fleet import Line
from vinoopt.hardware.detect import fingerprint
from vinoopt.records import Build, Device, DeviceSpec, HostFingerprint, RuntimeProperties, Target
from vinoopt.store import digest
from vinoopt.toolchains.calls import Call
from vinoopt.toolchains.host import npu_platform
from vinoopt.toolchains.npu_rewrites import rewrite_file
from vinoopt.tuning import TuneConfig, TuneResult, TuneTask
from vinoopt.tuning.task import samples_digest
from vinoopt.yardsticks import Here, Sample

_KEPT_BYTES = 1 << 30
"""Of inputs that a worker keeps between two errands."""
_PARCEL_BYTES, _PARCEL_CALLS = 64 << 20, 256
"""Of inputs that travel in one piece."""


def announced_name(target: Target) -> str:
    """What a worker announces that is the product: the profile's name, of a file its own without `.toml`."""
    return Path(target.profile.replace("\\", "/")).name.removesuffix(".toml")


def needs_of(target: Target) -> tuple[str, ...]:
    """Resources of a worker that can stand for the target; the CPU always, for it does one thing at a time."""
    return (*sorted({Device.CPU.value, target.device.value}), announced_name(target))


@dataclass(kw_only=True)
class Lab:
    """Whatever worker announces a target; see `yardsticks.Place`."""

    line: Line
    target: Target
    is_here: bool = False
    _host: HostFingerprint | None = None
    _identity: str | None = None
    _known: dict[int, tuple[Dataset, list[tuple[str, Dataset]]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A worker by what it announces."""
        return f"a worker that announces {announced_name(self.target)}"

    @property
    def host(self) -> HostFingerprint:
        """Of the worker that measured last; before that, of one that answers."""
        if self._host is None:
            self._host = self._ask(fingerprint)
        return self._host

    @property
    def identity(self) -> str:
        """The announced name, with the hardware and software behind it when this run began."""
        if self._identity is None:
            facts = (self.host.cpu, self.host.devices, self.host.versions)
            self._identity = f"{self.name} {digest(*facts)[:12]}"
        return self._identity

    def measure(
        self, contestants: Sequence[Contestant], samples: Sequence[Sample], config: MeasureConfig
    ) -> BenchResult:
        """Side by side on one worker; the source of each measurement names it."""
        result: BenchResult
        result, self._host = self._ask(_measure, tuple(contestants), tuple(samples), config)
        return result

    def predict(
        self, model: ov.Model, data: Dataset, *, properties: Mapping[str, str], device: Device
    ) -> Predictions:
        """On workers, which keep the data for the next candidate."""
        found = Predictions()
        for content, part in self._parcels(data):
            order = (model, content, dict(properties), device)
            calls = self._ask(_predict, *order, None)
            if calls is None:  # this worker has not seen them yet
                calls = self._ask(_predict, *order, tuple(part))
            for call in calls:
                found.append(call)
        return found

    def layer_times(
        self,
        model: ov.Model,
        device: Device,
        properties: Mapping[str, str],
        samples: Sequence[Sample],
        *,
        blocks: Sequence[str],
    ) -> Mapping[str, float]:
        """From the counters of the worker's device."""
        timed = partial(Here().layer_times, blocks=tuple(blocks))
        times: Mapping[str, float] = self._ask(timed, model, device, dict(properties), tuple(samples))
        return times

    def compile(
        self,
        ir: Path,
        spec: DeviceSpec,
        *,
        properties: RuntimeProperties,
        output: Path,
        samples: Sequence[Sample],
    ) -> tuple[Build, tuple[Call, ...]]:
        """On a worker; a blob comes back to `output`."""
        # What is shipped is what the compiler takes.
        findings = rewrite_file(ir, npu_platform(spec)) if spec.kind is Device.NPU else ()
        model = ov.Core().read_model(ir)
        build, blob, outputs = self._ask(_compile, model, spec, properties, tuple(samples))
        build = serde.replace(build, diagnostics=(*findings, *build.diagnostics))
        if blob is not None:
            output.write_bytes(blob)
        return build, outputs

    def tune(self, task: TuneTask, config: TuneConfig) -> TuneResult:
        """The whole race on one worker."""
        result: TuneResult = self._ask(Here().tune, task, config)
        return result

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        reply = self.line.ask(needs_of(self.target), _errand, packed((function, arguments)))
        return pickle.loads(reply)

    def _parcels(self, data: Dataset) -> list[tuple[str, Dataset]]:
        """The set in pieces that travel, each with the digest of its content, computed once per set."""
        kept = self._known.get(id(data))
        if kept is None or kept[0] is not data:
            size = max(sum(array.nbytes for array in data[0].values()), 1) if len(data) else 1
            count = min(max(_PARCEL_BYTES // size, 1), _PARCEL_CALLS)
            parts = [data.subset(range(n, min(n + count, len(data)))) for n in range(0, len(data), count)]
            kept = self._known[id(data)] = (data, [(samples_digest(part), part) for part in parts])
        return kept[1]


# --------------------------------------------------------------------------- what travels


class _Pickler(pickle.Pickler):
    """Pickles with OpenVINO models in them, as IR."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, ov.Model):
            return NotImplemented
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            ov.save_model(obj, path, compress_to_fp16=False)
            return _model_from, (path.read_bytes(), path.with_suffix(".bin").read_bytes())


def packed(value: Any) -> bytes:
    """The value as `pickle.loads` takes it, OpenVINO models included."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def _model_from(xml: bytes, weights: bytes) -> ov.Model:
    return ov.Core().read_model(model=xml, weights=weights)


# --------------------------------------------------------------------------- on the worker


Calls: TypeAlias = tuple[dict[str, np.ndarray[Any, Any]], ...]

_held: OrderedDict[str, Calls] = OrderedDict()
"""Content -> samples that this worker has been sent."""


def _errand(order: bytes) -> bytes:
    """Runs on the worker: the function with its arguments, models unpacked."""
    function, arguments = pickle.loads(order)
    return packed(function(*arguments))


def _measure(
    contestants: Sequence[Contestant], samples: Sequence[Sample], config: MeasureConfig
) -> tuple[BenchResult, HostFingerprint]:
    from distributed import get_worker

    result, host = Here().measure(contestants, samples, config), fingerprint()
    place = f"{host.cpu} at {get_worker().address}"
    sourced = tuple(serde.replace(each, source=place) for each in result.measurements)
    return serde.replace(result, measurements=sourced), host


def _predict(
    model: ov.Model,
    content: str,
    properties: Mapping[str, str],
    device: Device,
    calls: Calls | None,
) -> list[dict[str, np.ndarray[Any, Any]]] | None:
    """Outputs per call; None where the samples of this content are not here and were not sent."""
    if calls is not None:
        _held[content] = calls
        while len(_held) > 1 and sum(map(_bytes, _held.values())) > _KEPT_BYTES:
            _held.popitem(last=False)
    if content not in _held:
        return None
    _held.move_to_end(content)
    data = Dataset(reader=_held[content])
    found = Here().predict(model, data, properties=properties, device=device)
    return [found[index] for index in range(len(found))]


def _bytes(calls: Calls) -> int:
    return sum(array.nbytes for call in calls for array in call.values())


def _compile(
    model: ov.Model, spec: DeviceSpec, properties: RuntimeProperties, samples: Sequence[Sample]
) -> tuple[Build, bytes | None, tuple[Call, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        ir, blob = Path(folder) / "model.xml", Path(folder) / "model.blob"
        ov.save_model(model, ir, compress_to_fp16=False)
        build, outputs = Here().compile(ir, spec, properties=properties, output=blob, samples=samples)
        return build, blob.read_bytes() if blob.is_file() else None, outputs
