"""Measurement jobs on a fleet of machines, each result with the fingerprint of the machine that measured it.

A worker is a machine with this package and dask.distributed; it announces its devices and the shipped profile that
fits it as resources of one each, so that it measures one thing at a time::

    dask worker tcp://lab:8786 --nthreads 1 --memory-limit 0 --resources "$(python -m vinoopt.fleet)"

A job is what has to be measured side by side, so it is never split: it goes whole, models and inputs included, to
one worker that has what it needs. When that worker is lost, the scheduler gives the job to another one. Scheduler
and workers need the same versions of this package and of Python. A product that no shipped profile describes is
announced by the name of its profile file, added to the resources by hand.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import openvino as ov

from vinoopt import serde
from vinoopt.bench import BenchResult, Contestant, MeasureConfig, Sample, measure
from vinoopt.bench.pace import pace_contestant
from vinoopt.errors import InputError, ToolchainCrashed, ToolchainMissing, VinooptError
from vinoopt.hardware.detect import detect_host, fingerprint, match_host
from vinoopt.records import Device, HostFingerprint, Measurement, Record

HERE = "here"
CONNECT_S = 10.0
PATIENCE_S = 20.0
"""So long may a job find no worker that has what it needs; machines come back."""
_POLL_S = 0.25
_CENSUS_S = 2.0
_LARGE_GRAPH = "distributed.admin.large-graph-warning-threshold"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Contestants to measure side by side on one machine."""

    name: str
    contestants: tuple[Contestant, ...]
    samples: tuple[Sample, ...]
    config: MeasureConfig = field(default_factory=MeasureConfig)
    profile: str | None = None
    """The machine must announce this name; None: any that has the devices."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Resources that the machine must announce: the CPU always, for no two jobs may share a machine."""
        devices = {kind for c in self.contestants for kind in re.findall("|".join(Device), c.device)}
        return (*sorted({Device.CPU.value, *devices}), *([self.profile] if self.profile else []))


class Measured(Record):
    """What a job brought, and where."""

    job: str
    worker: str
    """Address of the worker, or `here`."""
    host: HostFingerprint
    result: BenchResult
    pace: Measurement | None = None
    """See `bench.runs.BenchRecord`."""


class Unmeasured(Record):
    """A job that brought nothing."""

    job: str
    reason: str


class FleetReport(Record):
    """What was measured and what was not, each in the order of the jobs."""

    measured: tuple[Measured, ...]
    unmeasured: tuple[Unmeasured, ...] = ()


Outcome = Measured | Unmeasured
Listener = Callable[[Outcome], None]


def announcement() -> tuple[str, ...]:
    """What this machine has to announce: its devices, and the shipped profile that fits it."""
    matched = match_host()
    return (*(str(kind) for kind in detect_host().devices), *([matched] if matched else []))


def measure_job(job: Job, *, worker: str = HERE) -> Measured:
    """The job measured on this machine; raises what `bench.measure` raises."""
    count = len(job.contestants)
    beside = pace_contestant(job.contestants[0].device, job.config.mode) if count else None
    result = measure([*job.contestants, *([beside] if beside else [])], job.samples, config=job.config)
    own, pace = result.measurements[:count], result.measurements[count:]
    return Measured(
        job=job.name,
        worker=worker,
        host=fingerprint(),
        result=serde.replace(result, measurements=own),
        pace=pace[0] if pace else None,
    )


def run(
    jobs: Sequence[Job],
    *,
    scheduler: str | None = None,
    patience_s: float = PATIENCE_S,
    on_outcome: Listener | None = None,
) -> FleetReport:
    """Every job measured on a worker of the scheduler that has what it needs, or all here without a scheduler.

    A job whose worker is lost is measured again on another one; a job that fails, or for `patience_s` seconds
    finds no worker, is reported with its reason and does not hold up the others. Ctrl-C gives up what is not yet
    done. Raises `InputError` where two jobs have one name, a model cannot be sent, or the scheduler does not answer.
    """
    names = [job.name for job in jobs]
    if len(set(names)) != len(names):
        raise InputError(f"jobs need names of their own: {', '.join(names)}")
    outcomes: dict[str, Outcome] = {}

    def tell(outcome: Outcome) -> None:
        outcomes[outcome.job] = outcome
        if on_outcome is not None:
            on_outcome(outcome)

    try:
        if scheduler is None:
            _run_here(jobs, tell)
        else:
            _run_on_fleet(jobs, scheduler, patience_s, tell)
    except KeyboardInterrupt:
        for name in names:
            if name not in outcomes:
                tell(Unmeasured(job=name, reason="interrupted"))
    ordered = [outcomes[name] for name in names]
    return FleetReport(
        measured=tuple(each for each in ordered if isinstance(each, Measured)),
        unmeasured=tuple(each for each in ordered if isinstance(each, Unmeasured)),
    )


# --------------------------------------------------------------------------- here


def _run_here(jobs: Sequence[Job], tell: Listener) -> None:
    here = announcement()
    for job in jobs:
        missing = sorted(set(job.needs) - set(here))
        if missing:
            tell(Unmeasured(job=job.name, reason=f"this machine lacks {', '.join(missing)}"))
            continue
        try:
            tell(measure_job(job))
        except VinooptError as exc:
            tell(Unmeasured(job=job.name, reason=_words(exc)))


# --------------------------------------------------------------------------- on workers


def _run_on_fleet(jobs: Sequence[Job], scheduler: str, patience_s: float, tell: Listener) -> None:
    with connected(scheduler) as client:
        waiting = {job.name: (job, _submit(client, job)) for job in jobs}
        starving: dict[str, float] = {}
        census_at = 0.0
        try:
            while waiting:
                for name, (_, future) in list(waiting.items()):
                    if future.status != "pending":
                        del waiting[name]
                        tell(_outcome(name, future))
                if time.monotonic() >= census_at:
                    for outcome in _starved(client, waiting, starving, patience_s):
                        waiting.pop(outcome.job)[1].cancel()
                        tell(outcome)
                    census_at = time.monotonic() + _CENSUS_S
                time.sleep(_POLL_S if waiting else 0.0)
        except OSError as exc:
            for name in waiting:
                tell(Unmeasured(job=name, reason=f"the scheduler was lost: {_words(exc)}"))
        finally:
            for _, future in waiting.values():
                future.cancel()


class Line:
    """A scheduler that is asked one thing at a time, each answered by a worker that has what it needs."""

    def __init__(self, client: Any, *, patience_s: float = PATIENCE_S) -> None:
        self._client = client
        self._patience_s = patience_s

    def serves(self, needs: Sequence[str]) -> bool:
        """Whether a worker announces all of it now; raises `ToolchainCrashed` where the scheduler is lost."""
        with _told():
            workers = self._client.run_on_scheduler(_census)
        return any(set(needs) <= set(each) for each in workers)

    def ask(self, needs: Sequence[str], function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns on a worker; asked of another worker where one is lost.

        Raises what the function raises of this package's errors, `ToolchainCrashed` where it ends otherwise or the
        scheduler is lost, and `ToolchainMissing` where for `patience_s` seconds no worker has what it needs.
        """
        with _told():
            future = self._client.submit(
                function, *arguments, key=f"errand-{uuid.uuid4().hex}", resources=dict.fromkeys(needs, 1)
            )
        try:
            self._wait(future, needs)
            with _told():
                if future.status == "finished":
                    return future.result()
                reason = future.exception() if future.status == "error" else None
        finally:
            with suppress(Exception):  # the scheduler may be gone, which is told already
                if future.status == "pending":
                    future.cancel()
        if isinstance(reason, VinooptError):
            raise reason
        raise ToolchainCrashed(
            f"the worker failed: {_words(reason)}" if reason else f"the scheduler gave it up ({future.status})"
        )

    def _wait(self, future: Any, needs: Sequence[str]) -> None:
        """Until the future has ended, one way or another."""
        since: float | None = None
        while future.status == "pending":
            with suppress(TimeoutError, asyncio.TimeoutError, CancelledError), _told():
                future.exception(timeout=_CENSUS_S)  # waits for the end, whatever it is
            if future.status != "pending" or self.serves(needs):
                since = None
            elif time.monotonic() - (since := since or time.monotonic()) >= self._patience_s:
                raise ToolchainMissing(f"for {self._patience_s:g} s no worker announced {', '.join(needs)}")


@contextmanager
def _told() -> Iterator[None]:
    """Raises `ToolchainCrashed` for whatever a client says of a scheduler that is gone."""
    try:
        yield
    except (VinooptError, TimeoutError, asyncio.TimeoutError, CancelledError):
        raise
    except Exception as exc:
        raise ToolchainCrashed(f"the scheduler was lost: {_words(exc)}") from exc


@contextmanager
def connected(scheduler: str) -> Iterator[Any]:
    """A client of the scheduler; raises `InputError` where it does not answer or dask is missing."""
    if find_spec("distributed") is None:
        raise InputError('dask.distributed is not installed; pip install "vinoopt[fleet]"')
    import dask
    from distributed import Client

    try:
        client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, asyncio.TimeoutError) as exc:
        raise InputError(
            f'the scheduler "{scheduler}" does not answer; start one with `dask scheduler` and give its address, '
            f"as tcp://HOST:8786 ({_words(exc)})"
        ) from exc
    with client, dask.config.set({_LARGE_GRAPH: "2GB"}):  # models travel with the job on purpose
        yield client


def _submit(client: Any, job: Job) -> Any:
    resources = dict.fromkeys(job.needs, 1)
    key = f"{job.name}-{uuid.uuid4().hex}"  # a result of an earlier run must not stand in for this one
    return client.submit(_measure_parcel, _pack(job), key=key, resources=resources)


def _outcome(name: str, future: Any) -> Outcome:
    if future.status == "finished":
        measured: Measured = future.result()
        return measured
    if future.status == "error":
        return Unmeasured(job=name, reason=_words(future.exception()))
    return Unmeasured(job=name, reason=f"the scheduler was lost or gave it up ({future.status})")


def _starved(
    client: Any, waiting: Mapping[str, tuple[Job, Any]], starving: dict[str, float], patience_s: float
) -> list[Unmeasured]:
    """Jobs that no worker could take for too long; `starving` says since when."""
    workers = client.run_on_scheduler(_census)
    found = []
    for name, (job, _) in waiting.items():
        if any(set(job.needs) <= set(each) for each in workers):
            starving.pop(name, None)
        elif time.monotonic() - starving.setdefault(name, time.monotonic()) >= patience_s:
            reason = f"for {patience_s:g} s no worker announced {', '.join(job.needs)}"
            found.append(Unmeasured(job=name, reason=reason))
    return found


def _census(dask_scheduler: Any) -> list[list[str]]:
    """What each worker that takes jobs announces; runs on the scheduler."""
    return [list(worker.resources) for worker in dask_scheduler.running]


def _words(exc: BaseException) -> str:
    return str(exc) if isinstance(exc, VinooptError) else f"{type(exc).__name__}: {exc}"


# --------------------------------------------------------------------------- parcels


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parcel:
    """A job whose models are files: name of the folder -> name of the file -> content, the model first."""

    job: Job
    files: tuple[Mapping[str, bytes], ...]


def _pack(job: Job) -> _Parcel:
    files = tuple(_files(each) for each in job.contestants)
    bare = tuple(replace(each, model=Path()) for each in job.contestants)
    return _Parcel(job=replace(job, contestants=bare), files=files)


def _files(contestant: Contestant) -> Mapping[str, bytes]:
    model = contestant.model
    if isinstance(model, ov.Model):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            ov.save_model(model, path, compress_to_fp16=False)
            return _ir_files(path)
    if not isinstance(model, Path):
        raise InputError(
            f"{contestant.name}: a compiled model cannot be sent; give its IR, ONNX file or blob"
        )
    if not model.is_file():
        raise InputError(f"{contestant.name}: {model}: no such file")
    if model.suffix == ".xml":
        return _ir_files(model)
    if model.suffix == ".onnx":  # with its external data, if any
        return {model.name: onnx.load(model).SerializeToString()}
    return {model.name: model.read_bytes()}


def _ir_files(path: Path) -> Mapping[str, bytes]:
    return {each.name: each.read_bytes() for each in (path, path.with_suffix(".bin")) if each.is_file()}


def _measure_parcel(parcel: _Parcel) -> Measured:
    """The job measured on this worker."""
    from distributed import get_worker

    with tempfile.TemporaryDirectory() as place:
        models = []
        for number, files in enumerate(parcel.files):
            folder = Path(place) / str(number)
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            models.append(folder / next(iter(files)))
        contestants = tuple(
            replace(each, model=model) for each, model in zip(parcel.job.contestants, models, strict=True)
        )
        return measure_job(replace(parcel.job, contestants=contestants), worker=get_worker().address)


if __name__ == "__main__":
    print(",".join(f"{name}=1" for name in announcement()))  # for `dask worker --resources`
