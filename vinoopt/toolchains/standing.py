"""Children that stay: one answers many requests, for work that takes less time than the start of a process.

A capped CPU reads its cap once per process, but the many short predictions of a search all run under the same
one. Starting a child for each took four fifths of their time. The parent names a folder on the child's standard
input; the child reads `request.json` there, writes `reply.json`, and ends when that input is closed, so that it
never outlives its parent.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vinoopt.errors import ToolchainCrashed, ToolchainTimeout
from vinoopt.records import Record
from vinoopt.toolchains import process as children
from vinoopt.toolchains.process import ChildExit, ChildReply

MOST_ANSWERS = 200
"""After so many a child is replaced, whatever it has gathered in memory."""
_FIRST_LOOK_S = 0.002
_LONGEST_LOOK_S = 0.05


class StandingChildren:
    """Runs requests like `run_child`, in one child per command and environment that is kept between them."""

    def __init__(self) -> None:
        self._children: dict[tuple[Any, ...], _Child] = {}

    def __call__(
        self,
        command: str | Sequence[str],
        *,
        request: Mapping[str, Any] | Record,
        timeout_s: float,
        env: Mapping[str, str | None] | None = None,
        memory_limit_bytes: int | None = None,
    ) -> ChildReply:
        """The answer of the child of this module and environment, which is started where there is none.

        Raises what `run_child` raises; a child that crashed or was late is ended, and the next request gets
        a new one.
        """
        argv = children.module_command(command) if isinstance(command, str) else list(command)
        key = (*argv, *sorted((env or {}).items()))
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = _Child(argv, env or {})
        try:
            reply = child.answer(request, timeout_s, memory_limit_bytes)
        except (
            ToolchainCrashed,
            ToolchainTimeout,
            KeyboardInterrupt,
        ):  # a refusal is an answer: that child stays
            self._children.pop(key).close()
            raise
        if child.answers >= MOST_ANSWERS:
            self._children.pop(key).close()
        return reply

    def close(self) -> None:
        """End all children; they end by themselves with this process."""
        while self._children:
            self._children.popitem()[1].close()


class _Child:
    """A process that answers requests until its standard input is closed."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str | None]) -> None:
        self.answers = 0
        self._name = children.display_name(argv)
        self._place: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(
            prefix="vinoopt-", ignore_cleanup_errors=True
        )
        self._folder = Path(self._place.name).resolve()
        children.write_request(self._folder, {"standing": True})
        with (
            (self._folder / children.STDOUT_FILE).open("wb") as out,
            (self._folder / children.STDERR_FILE).open("wb") as err,
        ):
            self._process = children.start(
                argv,
                folder=self._folder,
                env={**children.PACKAGE_PATH, **env},
                outputs=(out, err),
                stdin=subprocess.PIPE,
            )
        self.close = weakref.finalize(self, _end, self._process, self._place)

    def answer(
        self, request: Mapping[str, Any] | Record, timeout_s: float, memory_limit_bytes: int | None
    ) -> ChildReply:
        self.answers += 1
        folder = self._folder / str(self.answers)
        folder.mkdir()
        children.write_request(folder, request)
        started = time.monotonic()
        if self._process.stdin is not None:
            try:
                self._process.stdin.write(f"{folder.name}\n".encode())
                self._process.stdin.flush()
            except OSError:  # it has gone; what follows tells how
                self._process.wait()
        watch = children.Watch(self._name, self._folder, timeout_s, memory_limit_bytes)
        self._wait_for(folder / children.REPLY_FILE, started, watch)
        ended = ChildExit(
            name=self._name,
            returncode=self._process.poll() or 0,
            seconds=time.monotonic() - started,
            peak_memory_bytes=0,
            stdout=children.tail(self._folder / children.STDOUT_FILE),
            stderr=children.tail(self._folder / children.STDERR_FILE),
        )
        return ChildReply(values=children.read_reply(folder / children.REPLY_FILE, ended), exit=ended)

    def _wait_for(self, reply: Path, started: float, watch: children.Watch) -> None:
        """Returns when the reply is there, or the child has gone; raises at a limit of `watch`."""
        look = _FIRST_LOOK_S
        while not reply.is_file() and self._process.poll() is None:
            is_long = look >= _LONGEST_LOOK_S  # before that, looking would cost more than the answer
            taken = children.resident_bytes(self._process.pid) if is_long else 0
            watch.check(taken, is_late=time.monotonic() - started > watch.timeout_s)
            time.sleep(look)
            look = min(2 * look, _LONGEST_LOOK_S)


def _end(process: subprocess.Popen[bytes], place: tempfile.TemporaryDirectory[str]) -> None:
    children.kill_group(process)
    if process.stdin is not None:
        process.stdin.close()
    place.cleanup()
