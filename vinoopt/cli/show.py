"""Progress on stderr: a line that moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vinoopt.records import Event

_LASTING = frozenset({"trial", "data"})
"""Stages whose messages stay on the screen."""


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
        if event.stage in _LASTING or self._bar is None:
            self._console.print(f"{event.stage:8s}{event.message}", markup=False)
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=event.message[:90].replace("[", "\\["),
                total=event.total or None,
                completed=event.done,
            )
