"""What commands show: JSON on stdout; progress on stderr, a line that moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vinoopt.records import Event, Record

_LASTING = frozenset({"trial", "data"})
"""Stages whose messages stay on the screen."""


def strict_json(value: Record | dict[str, Any]) -> str:
    """JSON that every reader takes: what is no finite number is null."""
    whole = value.model_dump(mode="json") if isinstance(value, Record) else value
    return json.dumps(_finite(whole), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """Shows the events of a run; silent when `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = RichConsole(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Console:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_event(self, event: Event) -> None:
        """Show one event."""
        left = "" if event.remaining_s is None else about(event.remaining_s)
        if event.stage in _LASTING or self._bar is None:
            tail = f"  [{left}]" if left and event.stage == "trial" else ""
            self._console.print(f"{event.stage:8s}{event.message}{tail}", markup=False)
        if self._bar is not None:
            words = f"{left}: {event.message}" if left else event.message
            self._bar.update(
                self._task,
                description=words[:100].replace("[", "\\["),
                total=event.total or None,
                completed=event.done,
            )


def about(seconds: float) -> str:
    """`about 40 s left`, `about 3 min left`, `about 1.5 h left`: no finer than it is known."""
    if seconds < 95:
        return f"about {max(round(seconds / 5) * 5, 5)} s left"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min left"
    return f"about {seconds / 3600:.1f} h left"
