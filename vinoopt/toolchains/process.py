"""Child processes with a time limit, a memory limit and a JSON answer: the only place that spawns.

Drivers and foreign compilers read their environment once per process, crash, hang, and end with exit code 0
after dying. So each runs in a child of its own, and only a complete `reply.json` counts as an answer.

The protocol: the parent writes `request.json` into a fresh folder that is the child's working directory; the
child writes `reply.json` there in one step. Standard output and error go to files, never to pipes: a
grandchild that inherits a pipe keeps the reader waiting after the child has gone.

A child's module ends with::

    if __name__ == "__main__":  # a process started by multiprocessing imports this module again
        serve(answer)
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil

import vinoopt
from vinoopt.errors import (
    ToolchainCrashed,
    ToolchainError,
    ToolchainMissing,
    ToolchainRefused,
    ToolchainTimeout,
    VinooptError,
)
from vinoopt.records import Record

PROTOCOL_VERSION = 1
MEMORY_SHARE = 0.75
"""Of this machine's memory: a child that takes more would take everything else down with it."""
REQUEST_FILE = "request.json"
REPLY_FILE = "reply.json"
STDOUT_FILE = "stdout.log"
STDERR_FILE = "stderr.log"

POLL_S = 0.2
TAIL_BYTES = 4000
LOG_LIMIT_BYTES = 256 << 20
"""A child that writes more than this is stuck in a loop of messages and would fill the disk."""


def _package_path() -> dict[str, str]:
    root = Path(vinoopt.__file__).resolve().parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return {}
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(root), *([inherited] if inherited else [])])}


PACKAGE_PATH: dict[str, str] = _package_path()
"""Environment by which a child finds this package where it runs from a checkout."""

_KINDS: dict[str, type[ToolchainError]] = {
    "missing": ToolchainMissing,
    "crashed": ToolchainCrashed,
    "refused": ToolchainRefused,
}
_WINDOWS_STATUS = {
    0xC0000005: "access violation",
    0xC0000094: "integer division by zero",
    0xC00000FD: "stack overflow",
    0xC0000135: "a DLL was not found",
    0xC0000409: "fail fast",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildExit:
    """How a child process ended, with the end of what it printed."""

    name: str
    returncode: int
    seconds: float
    peak_memory_bytes: int
    stdout: str
    stderr: str

    @property
    def cause(self) -> str:
        """`SIGSEGV`, `exit code 3`, or a Windows status in words."""
        if self.returncode < 0 and sys.platform != "win32":
            return _signal_name(-self.returncode)
        words = _WINDOWS_STATUS.get(self.returncode & 0xFFFFFFFF)
        return words or f"exit code {self.returncode}"

    @property
    def is_crash(self) -> bool:
        """Whether a signal ended it, or what stands for one on Windows: no program ends itself like that."""
        if sys.platform == "win32":
            return self.returncode & 0xFFFFFFFF in _WINDOWS_STATUS
        return self.returncode < 0

    @property
    def tail(self) -> str:
        """The last lines of standard error, or of standard output where that is empty."""
        return (self.stderr.strip() or self.stdout.strip())[-TAIL_BYTES:]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildReply:
    """What a child answered: its reply without the protocol's own keys, and how it ran."""

    values: dict[str, Any]
    exit: ChildExit


def run_child(
    command: str | Sequence[str],
    *,
    request: Mapping[str, Any] | Record,
    timeout_s: float,
    env: Mapping[str, str | None] | None = None,
    memory_limit_bytes: int | None = None,
    collect: Mapping[str, Path] | None = None,
) -> ChildReply:
    """The answer of a child that speaks the protocol: a module's name (run by this Python) or an argv.

    `env` is laid over this process's environment; a value of None removes the variable. `collect` maps files
    that the child leaves in its folder to where they are to be kept; the folder itself is removed.

    Raises `ToolchainTimeout`, `ToolchainCrashed` (died, no reply, a reply that is not of this protocol, over
    the memory limit), or what the child reported: `ToolchainMissing`, `ToolchainRefused`.
    """
    argv = module_command(command) if isinstance(command, str) else list(command)
    with child_folder() as folder:
        write_request(folder, request)
        ended = run_process(
            argv,
            folder=folder,
            env={**PACKAGE_PATH, **(env or {})},
            timeout_s=timeout_s,
            memory_limit_bytes=memory_limit_bytes,
        )
        values = read_reply(folder / REPLY_FILE, ended)
        for name, destination in (collect or {}).items():
            _collect(folder / name, destination, ended)
    return ChildReply(values=values, exit=ended)


def memory_limit() -> int:
    """Resident bytes that a child may take where nothing narrower is known of it."""
    return int(MEMORY_SHARE * psutil.virtual_memory().total)


@contextmanager
def child_folder() -> Iterator[Path]:
    """A fresh working directory for one child, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="vinoopt-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


def module_command(module: str) -> list[str]:
    """The argv that runs a module with this Python."""
    return [sys.executable, "-m", module]


def run_process(
    argv: Sequence[str],
    *,
    folder: Path,
    timeout_s: float,
    env: Mapping[str, str | None] | None = None,
    memory_limit_bytes: int | None = None,
) -> ChildExit:
    """How a process ended that ran in `folder`; its output lies there in `stdout.log` and `stderr.log`.

    The process leads a session of its own, which is killed whole at the time limit, at the memory limit
    (resident bytes of the process and its children) and on an interrupt. An exit code is no verdict: the
    caller looks for its answer. Raises `ToolchainMissing` where the program cannot be started,
    `ToolchainTimeout`, `ToolchainCrashed` for the limits.
    """
    name = display_name(argv)
    started = time.monotonic()
    with (folder / STDOUT_FILE).open("wb") as out, (folder / STDERR_FILE).open("wb") as err:
        process = start(argv, folder=folder, env=env or {}, outputs=(out, err))
        watch = Watch(name, folder, timeout_s, memory_limit_bytes)
        try:
            peak = watch.until_end(process)
        finally:
            if process.poll() is None:
                kill_group(process)
    return ChildExit(
        name=name,
        returncode=process.returncode,
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak,
        stdout=tail(folder / STDOUT_FILE),
        stderr=tail(folder / STDERR_FILE),
    )


def start(
    argv: Sequence[str],
    *,
    folder: Path,
    env: Mapping[str, str | None],
    outputs: tuple[BinaryIO, BinaryIO],
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, its output in two files; raises `ToolchainMissing` where it cannot be."""
    try:
        return subprocess.Popen(
            list(argv),
            cwd=folder,
            env=_environment(env),
            stdin=stdin,
            stdout=outputs[0],
            stderr=outputs[1],
            **_own_group(),
        )
    except OSError as exc:
        raise ToolchainMissing(f"{display_name(argv)} could not be started: {exc}") from exc


def write_request(folder: Path, request: Mapping[str, Any] | Record) -> None:
    """Leave `request.json` in a folder, in one step."""
    _write_json(folder / REQUEST_FILE, {"v": PROTOCOL_VERSION, **_as_mapping(request)})


# --------------------------------------------------------------------------- the child's side


def serve(answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Answer the request that lies in the working directory; errors of our tree go into the reply.

    A request that is `standing` alone is followed by others, in the folders that standard input names.

    Does nothing in a process that multiprocessing started by `spawn`; a fork server imports modules without
    a name of its own, hence the guard shown at the top of this file. Any other exception ends the child with
    a traceback on standard error and no reply, which the parent reports as a crash.
    """
    if multiprocessing.current_process().name != "MainProcess":
        return
    here = Path.cwd()
    if not read_request().get("standing"):
        _answer_in(here, answer)
        return
    for line in sys.stdin:
        _answer_in(here / line.strip(), answer)


def _answer_in(folder: Path, answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    try:
        values = answer(read_request(folder))
    except VinooptError as exc:
        write_reply({"ok": False, "kind": _kind_of(exc), "message": str(exc)}, folder)
    else:
        write_reply({"ok": True, **values}, folder)


def read_request(folder: Path | None = None) -> dict[str, Any]:
    """The request in the working directory; raises `ToolchainError` for another protocol version."""
    request: dict[str, Any] = json.loads(((folder or Path.cwd()) / REQUEST_FILE).read_text(encoding="utf-8"))
    if request.pop("v", None) != PROTOCOL_VERSION:
        raise ToolchainError(f"{REQUEST_FILE} is not of protocol version {PROTOCOL_VERSION}")
    return request


def write_reply(values: Mapping[str, Any], folder: Path | None = None) -> None:
    """Leave `reply.json` in the working directory, in one step: it is there whole or not at all."""
    _write_json((folder or Path.cwd()) / REPLY_FILE, {"v": PROTOCOL_VERSION, **values})


def _kind_of(error: VinooptError) -> str:
    return next((kind for kind, cls in _KINDS.items() if isinstance(error, cls)), "refused")


# --------------------------------------------------------------------------- the parent's side


@dataclass(frozen=True, slots=True)
class Watch:
    """The limits of one child, and what is said where it reaches them."""

    name: str
    folder: Path
    timeout_s: float
    memory_limit_bytes: int | None

    def until_end(self, process: subprocess.Popen[bytes]) -> int:
        """Peak resident bytes that were seen before the child ended by itself; raises at a limit."""
        deadline = time.monotonic() + self.timeout_s
        peak = 0
        while True:
            try:
                process.wait(timeout=max(0.0, min(POLL_S, deadline - time.monotonic())))
                return peak
            except subprocess.TimeoutExpired:
                peak = max(peak, resident_bytes(process.pid))
                self.check(peak, is_late=time.monotonic() >= deadline)

    def check(self, peak: int, *, is_late: bool) -> None:
        """Raises `ToolchainTimeout` or `ToolchainCrashed` at a limit; `peak` is in resident bytes."""
        if is_late:
            raise ToolchainTimeout(
                f"{self.name} did not end within {self.timeout_s:g} s; that says nothing about the model. "
                f"Its last words: {self._last_words()}"
            )
        if self.memory_limit_bytes is not None and peak > self.memory_limit_bytes:
            raise ToolchainCrashed(
                f"{self.name} was ended at {peak >> 20} MiB, above its memory limit of "
                f"{self.memory_limit_bytes >> 20} MiB; that says nothing about the model"
            )
        for log in (STDOUT_FILE, STDERR_FILE):
            if (self.folder / log).stat().st_size > LOG_LIMIT_BYTES:
                raise ToolchainCrashed(
                    f"{self.name} was ended: it wrote more than {LOG_LIMIT_BYTES >> 20} MiB of messages. "
                    f"The last: {self._last_words()}"
                )

    def _last_words(self) -> str:
        text = tail(self.folder / STDERR_FILE).strip() or tail(self.folder / STDOUT_FILE).strip()
        return text[-400:] or "(none)"


def read_reply(path: Path, ended: ChildExit) -> dict[str, Any]:
    """The reply without the protocol's keys; raises what the child reported, or `ToolchainCrashed`."""
    try:
        reply = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ToolchainCrashed(
            f"{ended.name} ended with {ended.cause} and no answer; that says nothing about the model. "
            f"Its last words: {ended.tail or '(none)'}"
        ) from exc
    except (json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise ToolchainCrashed(f"{ended.name} left an answer that is not JSON: {exc}") from exc
    if not isinstance(reply, dict) or reply.pop("v", None) != PROTOCOL_VERSION or "ok" not in reply:
        raise ToolchainCrashed(f"{ended.name} left an answer that is not of protocol {PROTOCOL_VERSION}")
    if reply.pop("ok") is True:
        return reply
    kind = _KINDS.get(str(reply.get("kind")), ToolchainRefused)
    raise kind(str(reply.get("message") or f"{ended.name} gave no reason. {ended.tail}"))


def _collect(source: Path, destination: Path, ended: ChildExit) -> None:
    part = destination.with_name(destination.name + ".part")
    try:
        shutil.copyfile(source, part)
    except FileNotFoundError as exc:
        raise ToolchainCrashed(f"{ended.name} answered, but did not write {source.name}") from exc
    part.replace(destination)


def _as_mapping(request: Mapping[str, Any] | Record) -> Mapping[str, Any]:
    return request.model_dump(mode="json") if isinstance(request, Record) else request


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, default=os.fspath), encoding="utf-8")
    part.replace(path)


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    merged: dict[str, str | None] = {**os.environ, "PYTHONFAULTHANDLER": "1", **changes}
    return {key: value for key, value in merged.items() if value is not None}


def _own_group() -> dict[str, Any]:
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that `start` started, and all that it started itself."""
    if sys.platform == "win32":
        for each in _family(process.pid):
            with suppress(psutil.Error):
                each.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def resident_bytes(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    for each in _family(pid):
        with suppress(psutil.Error):
            total += int(each.memory_info().rss)
    return total


def tail(path: Path) -> str:
    """The end of a file that a child writes."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return stream.read().decode("utf-8", errors="replace")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def display_name(argv: Sequence[str]) -> str:
    """`vinoopt.toolchains.x` for a module, else the program's file name."""
    if len(argv) > 2 and argv[1] == "-m":
        return argv[2]
    return Path(argv[1] if len(argv) > 1 and argv[0] == sys.executable else argv[0]).name
